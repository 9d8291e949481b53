"""A small Hugging Face Hub on loopback for the real huggingface_hub client, with the routes for pushes and downloads.

It has repositories with branches and commits, tokens with roles, LFS storage at a separate origin, the known metadata
checks of `validate-yaml`, and configurable faults.
"""
import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote

import yaml

LFS_PATTERNS = ('*.bin', '*.pth', '*.pt', '*.safetensors', '*.zip', '*.tar', '*.pth.tar')
LICENSES = {'apache-2.0', 'mit', 'bsd-3-clause', 'cc-by-4.0', 'cc-by-nc-4.0', 'cc-by-sa-4.0', 'cc0-1.0', 'gpl-3.0',
            'other', 'unknown', 'openrail'}
PIPELINES = {'image-classification', 'image-feature-extraction', 'text-classification', 'object-detection'}
_ID = r'(?:[\w-]+/)?[\w.-]+'
_NAME = re.compile(r'[A-Za-z0-9][\w.-]{0,95}')


@dataclass
class User:
    """Owner of a token. role: 'write', 'read' or 'fineGrained' (write access only to `writable`)."""
    name: str
    role: str = 'write'
    orgs: tuple[str, ...] = ()
    writable: tuple[str, ...] = ()

    def may_write(self, repo_id: str) -> bool:
        if self.role == 'fineGrained':
            return repo_id in self.writable
        return self.role == 'write' and repo_id.partition('/')[0] in (self.name, *self.orgs)


@dataclass
class File:
    """A file in a commit."""
    content: bytes
    is_lfs: bool

    @property
    def blob_id(self) -> str:
        content = self.content
        if self.is_lfs:
            content = (f'version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize '
                       f'{len(self.content)}\n').encode()
        return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.blob_id


@dataclass
class Commit:
    oid: str
    parent: str | None
    title: str
    files: dict[str, File]


@dataclass
class Repository:
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, title: str, files: dict[str, File]) -> Commit:
        parent = self.branches.get(branch)
        oid = hashlib.sha1(json.dumps([parent, title, len(self.commits), sorted(
            (name, file.etag) for name, file in files.items())]).encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, files)
        self.branches[branch] = oid
        return self.commits[oid]

    def head(self, revision: str = 'main') -> Commit | None:
        return self.commits.get(self.branches.get(revision, revision))

    @property
    def titles(self) -> list[str]:
        """Titles of the commits on main, oldest first."""
        titles, commit = [], self.head()
        while commit is not None:
            titles.insert(0, commit.title)
            commit = self.commits.get(commit.parent)
        return titles


def metadata_errors(card: str) -> list[str]:
    """Errors in the metadata of a card, by the known checks of the Hub."""
    match = re.match(r'\A---\r?\n(.*?)\r?\n---(\r?\n|\Z)', card, flags=re.DOTALL)
    if not match:
        return []
    try:
        data = yaml.safe_load(match.group(1)) or {}
    except yaml.YAMLError as error:
        return [f'YAML: {error}']
    if not isinstance(data, dict):
        return ['metadata must be of type object']
    errors = []

    def check(is_right: bool, text: str) -> None:
        if not is_right:
            errors.append(text)

    def strings(value) -> bool:
        return isinstance(value, list) and all(isinstance(item, str) and item for item in value)

    for name in ('tags', 'datasets', 'metrics'):
        check(name not in data or strings(data[name]), f'"{name}" must be an array of strings')
    for name in ('license', 'library_name', 'pipeline_tag', 'license_name', 'license_link'):
        check(name not in data or isinstance(data[name], str), f'"{name}" must be a string')
    check(data.get('license', 'mit') in LICENSES, f'"license" must be one of {sorted(LICENSES)}')
    check(data.get('pipeline_tag', 'image-classification') in PIPELINES, f'"pipeline_tag" must be one of {PIPELINES}')
    for dataset in data.get('datasets') or ():
        check(bool(re.fullmatch(_ID, str(dataset))), f'"datasets[0]" with value "{dataset}" fails to match {_ID}')
    bases = data.get('base_model', [])
    for base in [bases] if isinstance(bases, str) else bases:
        check(bool(re.fullmatch(_ID, str(base))), f'"base_model" with value "{base}" is not valid')
    languages = data.get('language', [])
    for language in [languages] if isinstance(languages, str) else languages:
        check(bool(re.fullmatch(r'[a-z]{2,3}|code|multilingual', str(language))), '"language" must be ISO 639')
    index = data.get('model-index', [])
    check(isinstance(index, list), '"model-index" must be an array')
    for model in index if isinstance(index, list) else ():
        check(isinstance(model.get('name'), str) and bool(model['name']), '"model-index[0].name" must be a string')
        check(isinstance(model.get('results'), list) and bool(model['results']), '"model-index[0].results" is required')
        for result in model.get('results') or ():
            at = '"model-index[0].results[0]'
            check(isinstance(result.get('task', {}).get('type'), str), f'{at}.task.type" is required')
            dataset = result.get('dataset', {})
            check(isinstance(dataset.get('name'), str) and bool(dataset['name']), f'{at}.dataset.name" is required')
            check(bool(re.fullmatch(_ID, str(dataset.get('type', '')))),
                  f'{at}.dataset.type" with value "{dataset.get("type")}" fails to match {_ID}')
            check(bool(result.get('metrics')), f'{at}.metrics" is required')
            for metric in result.get('metrics') or ():
                check(isinstance(metric.get('type'), str), f'{at}.metrics[0].type" is required')
                check(isinstance(metric.get('value'), (int, float, str)) and metric['value'] == metric['value'],
                      f'{at}.metrics[0].value" is required')
    return errors


@dataclass
class Fault:
    """Faults of the next matching requests: a status, (status, headers), 'cut' (the connection is closed), 'mute' (no
    response to a completed request), or a function that is called first."""
    method: str
    pattern: str
    actions: list


class HubServer:
    """The Hub. `tokens` maps tokens to users, `repos` maps names to repositories, `requests` lists all requests."""

    def __init__(self):
        self.tokens: dict[str, User] = {}
        self.repos: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.RLock()
        self.gate: threading.Event | None = None  # uploads wait for it
        self.unmute = threading.Event()  # ends the connections of 'mute'
        self.hub = self._serve(_HubHandler)
        self.storage = self._serve(_StorageHandler)
        self.url = f'http://127.0.0.1:{self.hub.server_port}'
        # Another host than the Hub's. Some versions of the client compare hosts without ports.
        self.storage_url = f'http://localhost:{self.storage.server_port}'

    def _serve(self, handler: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
        server = ThreadingHTTPServer(('127.0.0.1', 0), type('Handler', (handler,), {'state': self}))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.05), daemon=True).start()
        return server

    def close(self) -> None:
        self.unmute.set()
        if self.gate is not None:
            self.gate.set()
        for server in (self.hub, self.storage):
            server.shutdown()
            server.server_close()

    def fail(self, method: str, pattern: str, *actions) -> None:
        """Apply one action to each of the next requests with this method and a path that matches the pattern."""
        self.faults.append(Fault(method, pattern, list(actions)))

    def count(self, method: str, pattern: str) -> int:
        """Number of requests with this method and a path that matches the pattern."""
        return sum(m == method and re.search(pattern, path) is not None for m, path in self.requests)

    def create(self, repo_id: str, private: bool = False) -> Repository:
        self.repos[repo_id] = repository = Repository(private)
        repository.commit('main', 'initial commit', {'.gitattributes': File(b'*.safetensors filter=lfs\n', False)})
        return repository

    def file(self, repo_id: str, path: str, revision: str = 'main') -> bytes:
        return self.repos[repo_id].head(revision).files[path].content

    def take_fault(self, method: str, path: str):
        with self.lock:
            self.requests.append((method, path))
            for fault in self.faults:
                if fault.method == method and re.search(fault.pattern, path) and fault.actions:
                    return fault.actions.pop(0)
        return None


class _Response(Exception):
    def __init__(self, status: int, body=None, **headers: str):
        self.status = status
        self.body = body
        self.headers = {name.replace('_', '-'): value for name, value in headers.items()}


def _not_found(what: str, status: int = 404) -> _Response:
    return _Response(status, {'error': what}, X_Error_Code=what.replace(' ', ''), X_Error_Message=what)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    state: HubServer

    def log_message(self, *args) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _chunks(self) -> Iterator[bytes]:
        if 'chunked' in self.headers.get('Transfer-Encoding', ''):
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            left = int(self.headers.get('Content-Length') or 0)
            while left > 0:
                chunk = self.rfile.read(min(left, 65536))
                if not chunk:
                    raise ConnectionError
                left -= len(chunk)
                yield chunk

    def _cut(self) -> None:
        """Reset the connection during the request."""
        next(self._chunks(), None)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        self.connection.close()
        self.close_connection = True

    def _handle(self) -> None:
        self.path, _, query = self.path.partition('?')
        self.query = parse_qs(query)
        self.path = unquote(self.path)
        fault = self.state.take_fault(self.command, self.path)
        try:
            if callable(fault):
                fault()
            elif fault == 'cut':
                return self._cut()
            self.body = b''.join(self._chunks())
            if isinstance(fault, (int, tuple)):
                status, headers = fault if isinstance(fault, tuple) else (fault, {})
                raise _Response(status, {'error': f'planned {status}'}, **headers)
            with self.state.lock:
                self.answer()
            raise _Response(404, {'error': f'no route {self.command} {self.path}'})
        except _Response as response:
            if fault == 'mute':
                self.state.unmute.wait()
                self.close_connection = True
            else:
                self._send(response)
        except (ConnectionError, BrokenPipeError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _send(self, response: _Response) -> None:
        body = response.body if isinstance(response.body, bytes) else json.dumps(response.body).encode()
        self.send_response(response.status)
        if not isinstance(response.body, bytes):
            self.send_header('Content-Type', 'application/json')
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)


class _StorageHandler(_Handler):
    """Storage of LFS objects at a separate origin, which accepts no tokens."""

    def answer(self) -> None:
        if self.headers.get('Authorization'):
            raise _Response(400, {'error': 'a token was sent to a place that must not have it'})
        oid = self.path.strip('/')
        if self.command == 'PUT':
            if self.state.gate is not None:
                self.state.lock.release()
                self.state.gate.wait()
                self.state.lock.acquire()
            if hashlib.sha256(self.body).hexdigest() != oid:
                raise _Response(400, {'error': 'content does not match'})
            self.state.objects[oid] = self.body
            raise _Response(200, b'')
        if oid in self.state.objects:
            raise _Response(200, self.state.objects[oid], ETag=f'"{oid}"')


class _HubHandler(_Handler):
    def answer(self) -> None:
        for method, pattern, route in (
                ('GET', r'/api/whoami-v2', self.whoami),
                ('POST', r'/api/repos/create', self.create_repo),
                ('POST', r'/api/validate-yaml', self.validate_yaml),
                ('GET', rf'/api/models/({_ID})/auth-check(/write)?', self.auth_check),
                ('POST', rf'/api/models/({_ID})/branch/(.+)', self.create_branch),
                ('POST', rf'/api/models/({_ID})/preupload/(.+)', self.preupload),
                ('POST', rf'/api/models/({_ID})/commit/(.+)', self.commit),
                ('GET', rf'/api/models/({_ID})/revision/(.+)', self.info),
                ('POST', rf'/({_ID})\.git/info/lfs/objects/batch', self.lfs_batch),
                ('POST', rf'/({_ID})\.git/info/lfs/verify', self.lfs_verify),
                ('GET', rf'/api/models/({_ID})', self.info),
                ('GET', rf'/({_ID})/resolve/([^/]+)/(.+)', self.resolve),
                ('HEAD', rf'/({_ID})/resolve/([^/]+)/(.+)', self.resolve),
        ):
            match = re.fullmatch(pattern, self.path)
            if method == self.command and match:
                route(*match.groups())

    @property
    def user(self) -> User | None:
        token = self.headers.get('Authorization', '').removeprefix('Bearer ')
        if not token:
            return None
        if token not in self.state.tokens:
            text = 'Invalid credentials in Authorization header'
            raise _Response(401, {'error': text}, X_Error_Message=text)
        return self.state.tokens[token]

    def json(self) -> dict:
        return json.loads(self.body)

    def repo(self, repo_id: str, write: bool = False) -> Repository:
        user, repository = self.user, self.state.repos.get(repo_id)
        member = user is not None and (repo_id.partition('/')[0] in (user.name, *user.orgs) or user.may_write(repo_id))
        if repository is None or (repository.private and not member):
            raise _not_found('Repo Not Found', 401 if user is None else 404)
        if write and user is None:
            raise _Response(401, {'error': 'Invalid username or password.'})
        if write and not user.may_write(repo_id):
            text = 'Forbidden: you must use a write token to upload to a repository.'
            raise _Response(403, {'error': text}, X_Error_Message=text)
        return repository

    def head(self, repository: Repository, revision: str) -> Commit:
        commit = repository.head(revision)
        if commit is None:
            raise _not_found('Revision Not Found')
        return commit

    def whoami(self) -> None:
        user = self.user
        if user is None:
            raise _Response(401, {'error': 'Invalid username or password.'})
        raise _Response(200, {
            'type': 'user', 'name': user.name, 'orgs': [{'name': name, 'roleInOrg': 'write'} for name in user.orgs],
            'auth': {'type': 'access_token', 'accessToken': {'displayName': 'test', 'role': user.role}}})

    def create_repo(self) -> None:
        user, given = self.user, self.json()
        if user is None:
            raise _Response(401, {'error': 'Invalid username or password.'})
        repo_id = f'{given.get("organization") or user.name}/{given["name"]}'
        if not _NAME.fullmatch(given['name']):
            raise _Response(400, {'error': 'Invalid repo name'})
        if not user.may_write(repo_id):
            text = f'You don\'t have the rights to create a model under the namespace "{repo_id.partition("/")[0]}"'
            raise _Response(403, {'error': text}, X_Error_Message=text)
        url = f'{self.state.url}/{repo_id}'
        if repo_id in self.state.repos:
            raise _Response(409, {'error': 'You already created this model repo', 'url': url})
        self.state.create(repo_id, given.get('private') or given.get('visibility') == 'private')
        raise _Response(200, {'url': url, 'name': repo_id, 'id': repo_id})

    def auth_check(self, repo_id: str, write: str | None) -> None:
        self.repo(repo_id, write=bool(write))
        raise _Response(200, {})

    def create_branch(self, repo_id: str, branch: str) -> None:
        repository = self.repo(repo_id, write=True)
        if branch in repository.branches:
            raise _Response(409, {'error': 'Reference already exists'})
        if branch.startswith('refs/') or re.fullmatch(r'[0-9a-f]{40}', branch):
            raise _Response(400, {'error': f'Invalid branch name {branch}'})
        repository.branches[branch] = repository.branches['main']
        raise _Response(200, {})

    def validate_yaml(self) -> None:
        errors = metadata_errors(self.json()['content'])
        empty = not self.json()['content'].startswith('---')
        raise _Response(400 if errors else 200, {
            'errors': [{'message': error} for error in errors],
            'warnings': [{'message': 'empty or missing yaml metadata in repo card'}] if empty else []})

    def info(self, repo_id: str, revision: str = 'main') -> None:
        commit = self.head(self.repo(repo_id), revision)
        siblings = []
        for name, file in sorted(commit.files.items()):
            sibling = {'rfilename': name}
            if self.query.get('blobs'):
                sibling.update(size=len(file.content), blobId=file.blob_id)
                if file.is_lfs:
                    sibling['lfs'] = dict(sha256=file.sha256, size=len(file.content), pointerSize=130)
            siblings.append(sibling)
        raise _Response(200, {'_id': '0', 'id': repo_id, 'modelId': repo_id, 'sha': commit.oid,
                              'private': self.state.repos[repo_id].private, 'siblings': siblings})

    def preupload(self, repo_id: str, revision: str) -> None:
        commit = self.head(self.repo(repo_id, write=True), revision)
        files = []
        for file in self.json()['files']:
            is_lfs = file['size'] > 10_000_000 or any(fnmatch(file['path'], pattern) for pattern in LFS_PATTERNS)
            existing = commit.files.get(file['path'])
            files.append({'path': file['path'], 'uploadMode': 'lfs' if is_lfs else 'regular', 'shouldIgnore': False,
                          'oid': existing.etag if existing else None})
        raise _Response(200, {'files': files})

    def lfs_batch(self, repo_id: str) -> None:
        self.repo(repo_id, write=True)
        objects = []
        for wanted in self.json()['objects']:
            item = dict(oid=wanted['oid'], size=wanted['size'])
            if wanted['oid'] not in self.state.objects:
                item['actions'] = {
                    'upload': {'href': f'{self.state.storage_url}/{wanted["oid"]}?signature=secret'},
                    'verify': {'href': f'{self.state.url}/{repo_id}.git/info/lfs/verify'}}
            objects.append(item)
        raise _Response(200, {'transfer': 'basic', 'objects': objects})

    def lfs_verify(self, repo_id: str) -> None:
        self.repo(repo_id, write=True)
        raise _Response(200 if self.json()['oid'] in self.state.objects else 404, {})

    def commit(self, repo_id: str, branch: str) -> None:
        repository = self.repo(repo_id, write=True)
        commit = self.head(repository, branch)
        if branch not in repository.branches:
            raise _Response(400, {'error': f'{branch} is not a branch'})
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]['value']
        if header.get('parentCommit') not in (None, commit.oid):
            raise _Response(412, {'error': 'A commit has happened since. Please refresh and try again.'})
        files = dict(commit.files)
        for line in lines[1:]:
            value = line['value']
            if line['key'] == 'file':
                files[value['path']] = File(base64.b64decode(value['content']), False)
            elif line['key'] == 'lfsFile':
                if value['oid'] not in self.state.objects:
                    raise _Response(400, {'error': f'LFS object {value["oid"]} is missing'})
                files[value['path']] = File(self.state.objects[value['oid']], True)
            else:
                raise _Response(400, {'error': f'unexpected {line["key"]}'})
        if 'README.md' in files and (errors := metadata_errors(files['README.md'].content.decode())):
            raise _Response(400, {'error': '; '.join(errors)})
        new = repository.commit(branch, header['summary'], files)
        raise _Response(200, {'success': True, 'commitOid': new.oid, 'commitUrl':
                              f'{self.state.url}/{repo_id}/commit/{new.oid}', 'pullRequestUrl': None})

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        commit = self.head(self.repo(repo_id), revision)
        file = commit.files.get(path)
        if file is None:
            response = _not_found('Entry Not Found')
            response.headers['X-Repo-Commit'] = commit.oid
            raise response
        if file.is_lfs:
            self.state.objects[file.sha256] = file.content
            raise _Response(302, b'', Location=f'{self.state.storage_url}/{file.sha256}', X_Repo_Commit=commit.oid,
                            X_Linked_Etag=f'"{file.sha256}"', X_Linked_Size=str(len(file.content)))
        raise _Response(200, file.content, ETag=f'"{file.etag}"', X_Repo_Commit=commit.oid)


@contextmanager
def serve() -> Iterator[HubServer]:
    """Run a Hub within a context."""
    server = HubServer()
    try:
        yield server
    finally:
        server.close()
