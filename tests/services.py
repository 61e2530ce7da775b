"""Servers on loopback for the remote back ends: transformers' own `serve`, and a door in front of any model
that speaks both protocols, counts what is asked, and fails on purpose."""

import base64, hashlib, io, json, os, random, socket, subprocess, sys, threading, time
import urllib.error, urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FAULTS = ('late', 'dropped', '429', '500', 'malformed', 'empty')


class TransformersServe:
    "`transformers serve` with one local folder, as its own process; `.url`, `.model` (its name there)"

    def __init__(self, folder):
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            port = s.getsockname()[1]
        self.model, self.url = str(folder), f'http://127.0.0.1:{port}/v1'
        command = [
            str(Path(sys.executable).parent / 'transformers'),
            'serve',
            self.model,
            '--device',
            'cpu',
            '--dtype',
            'float32',
            '--host',
            '127.0.0.1',
            '--port',
            str(port),
        ]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=dict(os.environ, HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1'),
        )
        end = time.time() + 120
        while True:
            try:
                urllib.request.urlopen(self.url[:-3] + '/health', timeout=2)
                break
            except OSError:
                if self.process.poll() is not None or time.time() > end:
                    self.process.kill()
                    raise RuntimeError(self.process.stderr.read()[-2000:]) from None
                time.sleep(0.2)
        threading.Thread(target=self.process.stderr.read, daemon=True).start()  # a full pipe would stop it

    def close(self):
        self.process.terminate()
        self.process.wait(20)

    def __call__(self, body):
        "Pass a question on"
        data = json.dumps(dict(body, model=self.model)).encode()
        r = urllib.request.Request(self.url + '/chat/completions', data, {'Content-Type': 'application/json'})
        with urllib.request.urlopen(r, timeout=60) as f:
            return json.loads(f.read())


def picture(body):
    "The image of a question in OpenAI's protocol, as bytes, or None"
    for p in body['messages'][0]['content']:
        if p['type'] == 'image_url':
            return base64.b64decode(p['image_url']['url'].split(',', 1)[1])


def words(body):
    return body['messages'][0]['content'][-1]['text']


def of_model(vlm):
    "A loaded model as an upstream: one question at a time; an image counts 50 tokens"
    from PIL import Image

    lock = threading.Lock()

    def answer(body):
        data = picture(body)
        im = Image.open(io.BytesIO(data)) if data else None
        with lock:
            a = vlm.ask(im, words(body))
        return reply(a.text, 10 + len(words(body)) // 4 + (50 if data else 0), max(1, len(a.tokens)))

    return answer


def reply(text, tokens_in=60, tokens_out=5, **message):
    "A reply in OpenAI's protocol"
    choice = dict(index=0, message=dict(role='assistant', content=text, **message), finish_reason='stop')
    return dict(model='served', choices=[choice], usage=dict(prompt_tokens=tokens_in, completion_tokens=tokens_out))


class Door:
    """In front of `upstream` (body -> reply). `log` holds (question's digest, outcome) in the order of arrival,
    `bodies` and `headers` what came. The `first` attempts at a question may fail: a fault is drawn from seed,
    question and attempt, so that threads do not change it."""

    def __init__(self, upstream, faults=0.0, kinds=FAULTS, seed=0, late=2.0, first=99, special=None):
        self.upstream, self.faults, self.kinds, self.seed = upstream, faults, kinds, seed
        self.late, self.first, self.special = late, first, special
        self.log, self.bodies, self.headers, self.tries, self.lock = [], [], [], {}, threading.Lock()
        door = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'
            wbufsize = -1  # one packet a reply: two wait 40 ms for each other

            def log_message(self, *args):
                pass

            def do_POST(self):
                door.serve(self)

        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    @property
    def answered(self):
        return [d for d, how in self.log if how == 'ok']

    def note(self, digest, how):
        with self.lock:
            self.log.append((digest, how))

    def serve(self, h):
        raw = h.rfile.read(int(h.headers['Content-Length']))
        body = json.loads(raw)
        claude = h.path.endswith('/messages')
        if claude:
            body = self.from_anthropic(body)
        digest = hashlib.sha256(words(body).encode() + (picture(body) or b'')).hexdigest()[:12]
        with self.lock:
            self.bodies.append(body)
            self.headers.append(dict(h.headers))
            self.tries[digest] = n = self.tries.get(digest, 0) + 1
        draw = random.Random(f'{self.seed} {digest} {n}')
        kind = draw.choice(self.kinds) if draw.random() < self.faults and n <= self.first else ''
        odd = self.special and self.special(body, h.headers, n)
        if odd:
            self.note(digest, 'special')
            return self.send(h, *odd[:2], **dict(*odd[2:]))
        if kind:
            self.note(digest, kind)
            return self.fail(h, kind, body, claude)
        try:
            out = self.upstream(body)
        except urllib.error.HTTPError as e:
            self.note(digest, str(e.code))
            return self.send(h, e.code, e.read())
        self.note(digest, 'ok')
        self.send(h, 200, json.dumps(self.to_anthropic(out) if claude else out).encode())

    def fail(self, h, kind, body, claude):
        "One fault: nothing comes in time, at all, or as it should"
        if kind == 'late':
            time.sleep(self.late)
            kind = 'dropped'
        if kind == 'dropped':
            h.connection.shutdown(socket.SHUT_RDWR)
            h.close_connection = True
        elif kind == '429':
            self.send(h, 429, b'{"error": {"message": "slow down"}}', **{'Retry-After': '0', 'retry-after-ms': '40'})
        elif kind == '500':
            self.send(h, 500, b'{"error": {"message": "oh"}}')
        elif kind == 'malformed':
            self.send(h, 200, b'{"choices": [{"message": {"cont')
        else:
            nothing = reply('', 60, 0)
            self.send(h, 200, json.dumps(self.to_anthropic(nothing) if claude else nothing).encode())

    def send(self, h, code, data, **headers):
        h.send_response(code)
        for k, v in {'Content-Type': 'application/json', 'Content-Length': len(data), **headers}.items():
            h.send_header(k, str(v))
        h.end_headers()
        h.wfile.write(data)
        h.wfile.flush()

    @staticmethod
    def from_anthropic(b):
        url = lambda s: f"data:{s['media_type']};base64,{s['data']}"
        parts = [
            dict(type='image_url', image_url=dict(url=url(p['source']))) if p['type'] == 'image' else p
            for p in b['messages'][0]['content']
        ]
        return dict(b, messages=[dict(role='user', content=parts)])

    @staticmethod
    def to_anthropic(r):
        m = r['choices'][0]['message']
        u = r['usage']
        refused = m.get('refusal')
        return dict(
            id='msg_1',
            type='message',
            role='assistant',
            model=r['model'],
            stop_sequence=None,
            stop_reason='refusal' if refused else 'end_turn',
            content=[dict(type='text', text=refused or m['content'])],
            usage=dict(input_tokens=u['prompt_tokens'], output_tokens=u['completion_tokens']),
        )
