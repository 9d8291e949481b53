#!/usr/bin/env python3
"""Compare training methods as a study says: every method at its own best learning rate, over several seeds.

A study is a YAML file (benchmarks/studies/ has ours): datasets, models, methods, learning rates, seeds. Each method of
each dataset and model first runs `tuning_seeds` seeds at every learning rate; the one with the best mean accuracy on
the validation split then runs all seeds, and their metrics on the test split are reported beside those of the best
baseline, which the validation split chooses too.

Runs are kept in benchmarks/results/, one JSON line each, and are never repeated: stop at any time and start again.

    python benchmarks/study.py benchmarks/studies/methods.yaml                          # run what is missing, report
    python benchmarks/study.py benchmarks/studies/methods.yaml --report-only --plot docs/images/methods.svg
    python benchmarks/study.py benchmarks/studies/methods.yaml --datasets digits --methods 'cross-entropy' dense
    python benchmarks/study.py benchmarks/studies/*.yaml --report-only --tables docs/results_tables.md
"""
import argparse
import os
import signal
import sys
from pathlib import Path

import yaml
from study_plan import Study, load_results, load_study, run_missing
from study_report import COLUMNS, page_header, plot, section

from timm_multimix.common.advice import missing_packages

RESULTS = Path(__file__).parent / 'results'


def _at_least_one(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'must be 1 or more, got {text!r}')
    return int(text)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('study', type=Path, nargs='+', help='YAML file of a study')
    for kind in ('datasets', 'models', 'methods'):
        parser.add_argument(f'--{kind}', nargs='+', metavar='NAME', help=f'only these {kind} (default: all)')
    parser.add_argument('--workers', type=_at_least_one, default=os.cpu_count(),
                        help='runs at a time (default: %(default)s)')
    parser.add_argument('--nice', type=int, default=0, help='lower the priority of the runs by this')
    parser.add_argument('--report-only', action='store_true', help='report what has been run, and run nothing')
    parser.add_argument('--baseline', metavar='METHOD', help='compare with this method (default: the best baseline)')
    parser.add_argument('--compare', default='accuracy', choices=[name for name, *_ in COLUMNS],
                        help='metric to compare (default: %(default)s)')
    parser.add_argument('--results', type=Path, default=RESULTS, metavar='DIR', help='(default: %(default)s)')
    parser.add_argument('--plot', type=Path, metavar='FILE', help='draw the result of one study, as SVG, PNG or PDF')
    parser.add_argument('--tables', type=Path, metavar='FILE', help='write the tables of the studies as Markdown')
    return parser.parse_args()


def load(args: argparse.Namespace) -> list[Study]:
    """The studies, reduced to what the command line selects. Ends the program if there is a mistake."""
    only = {kind: getattr(args, kind) for kind in ('datasets', 'models', 'methods')}
    try:
        studies = [load_study(path, only) for path in args.study]
    except (OSError, ValueError, yaml.YAMLError) as error:
        sys.exit(str(error))
    if args.plot and args.plot.suffix not in ('.svg', '.png', '.pdf'):
        sys.exit(f'--plot {args.plot}: give a file that ends with .svg, .png or .pdf.')
    if args.plot and len(studies) > 1:
        sys.exit('--plot draws one study: name one.')
    if args.baseline:
        for study in studies:
            if args.baseline not in study.methods:
                sys.exit(f'--baseline {args.baseline}: methods are {", ".join(study.methods)}.')
            study.baselines = [args.baseline]
    return studies


def main() -> None:
    args = parse_args()
    studies = load(args)
    results = load_results(args.results)
    stopped = False
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or the runs' processes would outlive this one
    missing = missing_packages('A study', ['captum', 'torchmetrics'], extra='eval')
    if missing and not args.report_only:
        sys.exit(missing)
    try:
        for study in studies if not args.report_only else ():
            run_missing(study, results, args.results, args.workers, args.nice)
    except KeyboardInterrupt:
        print('Stopped; start again to go on.', file=sys.stderr)
        stopped = True
    sections = [section(study, study.table(results), args.compare) for study in studies]
    if args.tables:
        args.tables.write_text('\n'.join([page_header(args.study), *sections]))
    else:
        print('\n'.join(sections))
    if args.plot:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        plot(studies[0], studies[0].table(results), args.plot)
    if stopped:
        sys.exit(130)


if __name__ == '__main__':
    main()
