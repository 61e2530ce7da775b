"Downloading from a server on loopback that truncates, stalls, lies about lengths and serves other bytes."

import hashlib, io, json, socket, threading, time, zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import numpy as np
import pytest
from fada import fetch
from fada.fetch import Remote, download, get, published_files, unpack
from fada.settings import FadaError

BODY = np.random.default_rng(1).bytes(200_000)


def archive():
    f = io.BytesIO()
    with zipfile.ZipFile(f, 'w') as z:
        z.writestr('training_set_pixel_size_and_HC.csv', 'filename,pixel size(mm),head circumference (mm)\n')
        z.writestr('training_set/a.txt', 'x' * 50_000)
    return f.getvalue()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *a):
        pass

    def do_GET(self):
        s = self.server
        kind = self.path.strip('/').split('/')[0]
        s.asked.append((kind, self.headers.get('Range')))
        start = int((self.headers.get('Range') or 'bytes=0-')[6:-1])
        n = len(s.asked)
        body = s.bodies.get(kind, BODY)
        length, send = len(body) - start, body[start:]
        status = 206 if self.headers.get('Range') else 200
        if kind == 'record':
            body = send = json.dumps(s.record).encode()
            length = len(body)
        if kind == 'norange':
            status, start, send, length = 200, 0, body if n > 1 else body[:50_000], len(body)
        if kind == 'truncates':
            send = send[:30_000]
        if kind == 'drips':
            send = send[:1]
        if kind == 'short-length':
            length = 1000
            send = send[:1000]  # claims to be complete after 1000 bytes
        if kind == 'long-length':
            length += 5000  # promises bytes that never come
        if kind == 'too-long':
            send = body + b'x' * 1000
            length = len(send)
        if kind == 'wrong':
            send = bytes(len(send))
        if kind == 'wrong-once' and n == 1:
            send = bytes(len(send))
        if kind == 'down' or (kind == 'down-once' and n == 1):
            self.send_error(503)
            return
        if kind == 'bad-range' and self.headers.get('Range'):
            start += 7
            send = body[start:]
            length = len(send)
        self.send_response(status)
        self.send_header('Content-Length', str(length))
        if status == 206:
            self.send_header('Content-Range', f'bytes {start}-{len(body) - 1}/{len(body)}')
        self.end_headers()
        if kind == 'bad-range' and not self.headers.get('Range'):
            send = send[:20_000]
        if kind == 'stalls' and n < 3:
            self.wfile.write(send[:60_000])
            self.wfile.flush()
            time.sleep(1.2)
            return
        try:
            self.wfile.write(send)
        except OSError:
            pass
        self.close_connection = True


@pytest.fixture
def server():
    s = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    s.daemon_threads = True
    s.asked, s.bodies, s.record = [], {}, {}
    t = threading.Thread(target=s.serve_forever, kwargs=dict(poll_interval=0.02))
    t.start()
    yield s
    s.shutdown()
    s.server_close()
    t.join()


def remote(s, kind, body=BODY):
    return Remote(
        f'{kind}.bin',
        f'http://127.0.0.1:{s.server_port}/{kind}/f',
        len(body),
        f'sha256:{hashlib.sha256(body).hexdigest()}',
    )


@pytest.mark.parametrize(
    'kind', ['fine', 'truncates', 'stalls', 'short-length', 'long-length', 'norange', 'wrong-once', 'down-once']
)
def test_a_bad_line_still_gives_the_whole_file(server, tmp_path, kind):
    p = download(remote(server, kind), tmp_path, timeout=0.4, pause=0.01)
    assert p.read_bytes() == BODY and not list(tmp_path.glob('.*.part'))
    if kind in ('truncates', 'stalls'):
        assert any(r for _, r in server.asked[1:])  # it went on, not anew
    n = len(server.asked)
    download(remote(server, kind), tmp_path)
    assert len(server.asked) == n  # nothing is asked twice


@pytest.mark.parametrize(
    'kind,said',
    [('too-long', 'more bytes than the published'), ('wrong', 'another checksum'), ('down', '503|Service')],
)
def test_a_lie_is_never_a_file(server, tmp_path, kind, said):
    with pytest.raises(FadaError, match=said):
        download(remote(server, kind), tmp_path, timeout=0.4, tries=2, pause=0.01)
    assert not (tmp_path / f'{kind}.bin').exists()


def test_a_shifted_range_is_not_glued_on(server, tmp_path):
    with pytest.raises(FadaError):
        download(remote(server, 'bad-range'), tmp_path, timeout=0.4, tries=2, pause=0.01)
    assert not (tmp_path / 'bad-range.bin').exists()


def test_get_says_licence_size_and_time_first(server, tmp_path, monkeypatch):
    z = archive()
    server.bodies['zip'] = z
    said = []
    url = f'http://127.0.0.1:{server.server_port}'
    server.record = dict(
        files=[
            dict(
                key='training_set.zip',
                size=len(z),
                checksum='md5:' + hashlib.md5(z).hexdigest(),
                links=dict(self=f'{url}/zip/f'),
            )
        ]
    )
    with pytest.raises(FadaError, match='licence CC BY 4.0 is not accepted'):
        get('hc18', tmp_path / 'd', address=f'{url}/record', say=said.append)
    assert (
        'minutes at 10 Mbit/s' in said[0]
        and not (tmp_path / 'd').exists()
        and [k for k, _ in server.asked] == ['record']
    )
    got = get('hc18', tmp_path / 'd', True, f'{url}/record', say=said.append)
    assert (tmp_path / 'd' / 'training_set' / 'a.txt').stat().st_size == 50_000 and got['accepted'] == 'CC BY 4.0'
    usage = fetch.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(fetch.shutil, 'disk_usage', lambda p: usage._replace(free=1000))
    with pytest.raises(FadaError, match='GB free'):
        get('hc18', tmp_path / 'e', True, f'{url}/record', say=said.append)


def test_records_and_archives_that_cannot_be_trusted(server, tmp_path):
    url = f'http://127.0.0.1:{server.server_port}'
    server.record = dict(files=[dict(key='x', size=5, checksum='md5:0', links=dict(self='http://example.org/x'))])
    with pytest.raises(FadaError, match='not https'):
        download(published_files('hc18', f'{url}/record')[0], tmp_path)
    server.record = dict(message='gone')
    with pytest.raises(FadaError, match='unknown record'):
        published_files('hc18', f'{url}/record')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        free = s.getsockname()[1]
    with pytest.raises(FadaError, match='no answer.*by hand'):
        published_files('hc18', f'http://127.0.0.1:{free}/')
    with zipfile.ZipFile(tmp_path / 'evil.zip', 'w') as z:
        z.writestr('../out.txt', 'x')
    with pytest.raises(FadaError, match='reaches out'):
        unpack(tmp_path / 'evil.zip', tmp_path / 'in')
    assert not (tmp_path / 'out.txt').exists()


def test_a_server_that_gives_one_byte_a_connection_is_left(server, tmp_path):
    "It never stalls and never ends: not a byte each, but what they bring together is progress"
    r = remote(server, 'drips')
    with pytest.raises(FadaError, match='ended early|not downloaded'):
        download(r, tmp_path, timeout=0.4, tries=4, pause=0.001)
    assert len(server.asked) == 4 and (tmp_path / '.drips.bin.part').stat().st_size == 4
