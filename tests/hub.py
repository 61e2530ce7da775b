"""A server on loopback that speaks the part of the hub's protocol that downloads and uploads use, with faults on
request."""

import base64, hashlib, json, re, socket, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Hub:
    """Serves folders as repositories: `Hub({'group/name': folder})`; `.url`, `.requests`, `.stop_after`
    (bytes, once), `.gated`, `.private`; `new`: folder that takes repositories which are made there"""

    def __init__(self, repositories, new=None):
        self.repositories = {k: Path(v) for k, v in repositories.items()}
        self.requests, self.stop_after, self.gated, self.damage = [], None, set(), None
        self.new, self.private, self.objects = new, set(), {}
        self.commit = 'c0ffee' + '0' * 34
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'

            def log_message(self, *args):
                pass

            def do_GET(self):
                hub.serve(self, True)

            def do_HEAD(self):
                hub.serve(self, False)

            def do_POST(self):
                hub.take(self)

            def do_PUT(self):
                hub.take(self)

        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo):
        return {
            str(p.relative_to(self.repositories[repo])): p
            for p in sorted(self.repositories[repo].rglob('*'))
            if p.is_file()
        }

    def answer(self, h, code, body=b'', **headers):
        h.send_response(code)
        for k, v in {'Content-Length': len(body), **headers}.items():
            h.send_header(k.replace('_', '-'), str(v))
        h.end_headers()
        if h.command != 'HEAD':
            h.wfile.write(body)

    def json(self, h, obj):
        self.answer(h, 200, json.dumps(obj).encode(), Content_Type='application/json')

    def serve(self, h, body):
        self.requests.append((h.command, h.path, h.headers.get('Range')))
        path = h.path.split('?')[0]
        api = re.fullmatch(r'/api/models/([^/]+/[^/]+?)(?:/(revision|tree)/([^/]+))?', path)
        file = re.fullmatch(r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', path)
        repo = (api or file) and (api or file).group(1)
        if repo not in self.repositories:
            return self.answer(h, 404, **{'X-Error-Code': 'RepoNotFound'})
        revision = (api.group(3) or 'main') if api else file.group(2)
        if revision not in ('main', self.commit):
            return self.answer(h, 404, **{'X-Error-Code': 'RevisionNotFound'})
        if repo in self.gated and h.headers.get('Authorization') != 'Bearer hf_good':
            return self.answer(h, 403, **{'X-Error-Code': 'GatedRepo'})
        if api:
            return self.describe(h, repo, api.group(2))
        self.send_file(h, self.files(repo).get(file.group(3)))

    def take(self, h):
        "What an upload sends"
        body = h.rfile.read(int(h.headers.get('Content-Length') or 0))
        path = h.path.split('?')[0]
        self.requests.append((h.command, h.path, None))
        if put := re.fullmatch(r'/objects/(\w+)', path):
            good = hashlib.sha256(body).hexdigest() == put.group(1)
            self.objects[put.group(1)] = body
            return self.answer(h, 200 if good else 400)
        if h.headers.get('Authorization') != 'Bearer hf_good':
            return self.answer(h, 401)
        if path.endswith('/commit/main'):
            return self.commit_files(h, body)
        said = json.loads(body)
        if path == '/api/validate-yaml':
            return self.json(h, dict(errors=[], warnings=[]))
        if path == '/api/repos/create':
            return self.create(h, said)
        if path.endswith('/preupload/main'):
            return self.json(
                h,
                dict(
                    files=[
                        dict(
                            path=f['path'],
                            shouldIgnore=False,
                            oid=None,
                            uploadMode='lfs' if f['path'].endswith(('.safetensors', '.npz')) else 'regular',
                        )
                        for f in said['files']
                    ]
                ),
            )
        if path.endswith('.git/info/lfs/objects/batch'):
            return self.json(
                h,
                dict(
                    transfer='basic',
                    objects=[
                        dict(o, actions=dict(upload=dict(href=f"{self.url}/objects/{o['oid']}")))
                        for o in said['objects']
                    ],
                ),
            )
        self.answer(h, 404)

    def create(self, h, said):
        repo = f"{said['organization']}/{said['name']}"
        if repo in self.repositories:
            return self.answer(h, 409, json.dumps(dict(url=f'{self.url}/{repo}')).encode())
        self.repositories[repo] = Path(self.new) / repo
        self.repositories[repo].mkdir(parents=True)
        if said.get('visibility') == 'private' or said.get('private'):
            self.private.add(repo)
        self.json(h, dict(url=f'{self.url}/{repo}', name=repo))

    def commit_files(self, h, body):
        repo = re.match(r'/api/models/([^/]+/[^/]+)/', h.path).group(1)
        for line in map(json.loads, body.splitlines()):
            v = line['value']
            to = self.repositories[repo] / v.get('path', '')
            if line['key'] == 'file':
                to.write_bytes(base64.b64decode(v['content']))
            if line['key'] == 'lfsFile':
                to.write_bytes(self.objects[v['oid']])
        self.json(h, dict(commitUrl=f'{self.url}/{repo}/commit/{self.commit}', commitOid=self.commit))

    def describe(self, h, repo, kind):
        entries = []
        for name, p in self.files(repo).items():
            data = p.read_bytes()
            sha = hashlib.sha256(data).hexdigest()
            e = dict(
                size=len(data),
                **(
                    dict(lfs=dict(sha256=sha, oid=sha, size=len(data), pointerSize=134))
                    if name.endswith('.safetensors')
                    else {}
                ),
            )
            entries.append(
                dict(e, type='file', path=name, oid=hashlib.sha1(data).hexdigest())
                if kind == 'tree'
                else dict(e, rfilename=name, blobId=hashlib.sha1(data).hexdigest())
            )
        self.json(
            h,
            entries
            if kind == 'tree'
            else dict(
                id=repo,
                modelId=repo,
                sha=self.commit,
                private=repo in self.private,
                gated=repo in self.gated,
                tags=[],
                siblings=entries,
            ),
        )

    def send_file(self, h, p):
        if p is None:
            return self.answer(h, 404, **{'X-Error-Code': 'EntryNotFound'})
        data = p.read_bytes()
        etag = hashlib.sha256(data).hexdigest()
        start = 0
        if self.damage and p.name == self.damage:
            data = data[:-100] + bytes(100)
        head = {
            'ETag': f'"{etag}"',
            'X-Repo-Commit': self.commit,
            'Accept-Ranges': 'bytes',
            'X-Linked-Size': len(data),
            'X-Linked-Etag': f'"{etag}"',
        }
        wants = re.fullmatch(r'bytes=(\d+)-', h.headers.get('Range') or '')
        if wants:
            start = int(wants.group(1))
            head['Content-Range'] = f'bytes {start}-{len(data) - 1}/{len(data)}'
        part = data[start:]
        cut = self.stop_after if h.command == 'GET' and p.suffix == '.safetensors' else None
        h.send_response(206 if wants else 200)
        for k, v in {'Content-Length': len(part), **head}.items():
            h.send_header(k, str(v))
        h.end_headers()
        if h.command != 'GET':
            return
        if cut is not None and cut < len(part):
            h.wfile.write(part[:cut])
            h.wfile.flush()
            h.connection.shutdown(socket.SHUT_RDWR)
            h.close_connection = True
            return
        h.wfile.write(part)
