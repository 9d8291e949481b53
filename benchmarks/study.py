#!/usr/bin/env python3
"""Compare training methods, each with its own tuned learning rate, over several seeds.

A study is a YAML file with datasets, models, methods, learning rates and seeds (see benchmarks/studies/). For each
dataset, model and method, all learning rates are run with `tuning_seeds` seeds. The learning rate with the best mean
validation accuracy is run with all seeds. The report compares test metrics with the best baseline, which is selected by
validation accuracy too. A study with a section `detection` transfers the models to object detection (see
benchmarks/detection_study.py).

Each run is stored as a JSON line in benchmarks/results/ and is not repeated. An interrupted study can be resumed.

    python benchmarks/study.py benchmarks/studies/methods.yaml                          # run missing runs and report
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
from study_report import page_header, plot, ranking, section

from timm_multimix.common.command_line import check_packages, number
from timm_multimix.common.errors import UsageError

RESULTS = Path(__file__).parent / 'results'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('study', type=Path, nargs='+', help='YAML file of a study')
    for kind in ('datasets', 'models', 'methods'):
        add(f'--{kind}', nargs='+', metavar='NAME', help=f'{kind} to include (default: all)')
    add('--workers', type=number(int, 1), default=os.cpu_count(), help='number of parallel runs (default: %(default)s)')
    add('--nice', type=int, default=0, help='niceness increment of the runs (default: %(default)s)')
    add('--report-only', action='store_true', help='report completed runs and start no runs')
    add('--baseline', metavar='METHOD', help='method to compare with (default: the best baseline)')
    add('--compare', metavar='METRIC', help='metric to compare (default: accuracy, or mAP for detection)')
    add('--rank', nargs='+', metavar='METHOD',
        help='instead of the tables, compare these methods over all settings that have all of them')
    add('--results', type=Path, default=RESULTS, metavar='DIR', help='folder of the runs (default: %(default)s)')
    add('--plot', type=Path, metavar='FILE', help='plot the first study to an SVG, PNG or PDF file')
    add('--tables', type=Path, metavar='FILE', help='write the tables to a Markdown file')
    return parser.parse_args()


def load(args: argparse.Namespace) -> list[Study]:
    """Load the selected parts of the studies. Exit with a message if an argument is invalid."""
    only = {kind: getattr(args, kind) for kind in ('datasets', 'models', 'methods')}
    try:
        studies = [load_study(path, only) for path in args.study]
        if not args.report_only:
            check_packages('A study', ['captum', 'torchmetrics'], extra='eval')
    except (OSError, ValueError, yaml.YAMLError, UsageError) as error:
        sys.exit(str(error))
    if args.plot and args.plot.suffix not in ('.svg', '.png', '.pdf'):
        sys.exit(f'--plot {args.plot}: the file name must end with .svg, .png or .pdf.')
    for study in studies:
        for option, names in (('compare', [name for name, *_ in study.columns]), ('baseline', study.methods)):
            if getattr(args, option) not in (None, *names):
                sys.exit(f'--{option} must be one of {", ".join(names)}, got {getattr(args, option)}.')
        if args.baseline:
            study.baselines = [args.baseline]
    return studies


def main() -> None:
    args = parse_args()
    studies = load(args)
    results = load_results(args.results)
    stopped = False
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # shut down the worker processes too
    try:
        for study in studies if not args.report_only else ():
            run_missing(study, results, args.results, args.workers, args.nice)
    except KeyboardInterrupt:
        print('Stopped. Run the same command again to resume.', file=sys.stderr)
        stopped = True
    tables = [study.table(results) for study in studies]
    if args.rank:
        print(ranking(studies, tables, args.rank, args.compare or 'accuracy'))
        return
    sections = [section(study, table, args.compare) for study, table in zip(studies, tables, strict=True)]
    if args.tables:
        args.tables.write_text('\n'.join([page_header(args.study), *sections]))
    else:
        print('\n'.join(sections))
    if args.plot:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        plot(studies[0], tables[0], args.plot)
    if stopped:
        sys.exit(130)


if __name__ == '__main__':
    main()
