"`fada serve` as its clients meet it: a real server on loopback, real sockets, real kills."

import http.client, json, os, secrets, signal, socket, subprocess, sys, threading, time
import psutil
import pytest
from PIL import Image
from commands import typed
from fada.serve import LIMIT, Served, data_url
from fada.settings import FadaError

TOKEN = 'test-token-0'
ROUNDING = 5e-7  # of the difference of two log-probabilities in float32, as two processes add them up


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@pytest.fixture(scope='module')
def picture():
    from fada.phantoms import make_phantom

    return Image.fromarray(make_phantom('Femur', (99, 1, 0)).image).convert('RGB')


@pytest.fixture(scope='module')
def nano():
    from fada.vlm import load

    return load('blip2-nano')


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    "A server with the embedded model; (url, process)"
    d = tmp_path_factory.mktemp('serve')
    (d / 'settings.ini').write_text(f'[output]\nfolder = {d}/outputs\n')
    port = free_port()
    p = subprocess.Popen(
        typed('serve --port {port}', port=port),
        cwd=d,
        env=dict(os.environ, FADA_TOKEN=TOKEN, FADA_THREADS='1'),
        stdout=open(d / 'out', 'w'),
        stderr=open(d / 'err', 'w'),
        start_new_session=True,
    )
    wait_for(port)
    yield f'http://127.0.0.1:{port}', p, d
    children = psutil.Process(p.pid).children(recursive=True)
    p.send_signal(signal.SIGINT)
    assert p.wait(30) == 130
    gone, alive = psutil.wait_procs(children, timeout=10)
    assert not alive  # no orphan holds the models
    assert 'Traceback' not in (d / 'err').read_text(), (d / 'err').read_text()


def wait_for(port, seconds=60):
    for _ in range(seconds * 10):
        try:
            c = http.client.HTTPConnection('127.0.0.1', port, timeout=2)
            c.request('GET', '/health')
            if c.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError('it does not come up')


def raw(url, method='GET', path='/v1/models', body=None, **headers):
    "(status, text) of a request with exactly these headers"
    c = http.client.HTTPConnection(url.split('//')[1], timeout=60)
    h = {'Host': url.split('//')[1], 'Authorization': f'Bearer {TOKEN}', **headers}
    c.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for k, v in h.items():
        if v is not None:
            c.putheader(k.replace('_', '-'), v)
    if body is not None:
        c.putheader('Content-Length', str(len(body)))
    c.endheaders(body)
    r = c.getresponse()
    return r.status, r.read().decode()


def test_answers_are_those_of_the_loaded_model(server, picture, nano):
    "One question streamed, eight in a batch, and the session's history; free text with markup stays text"
    vlm = nano
    m = Served(server[0], TOKEN)
    s = m.stream(picture, 'quality')
    assert ''.join(s) == vlm.ask(picture, 'quality').text == s.answer.text and s.answer.confidence > 0
    assert [a.text for a in m.ask(picture)] == [a.text for a in vlm.ask(picture)]
    a = m.ask(picture, '<img src=x onerror=alert(1)> ?')
    assert a.question == '<img src=x onerror=alert(1)> ?'
    assert [h['question_id'] for h in m.history()] == [6, *range(1, 9), None]


def test_what_is_refused_at_the_door(server, picture):
    "No token, a wrong one, another host, another site, too large, a chunked body, other routes and paths"
    url = server[0]
    assert raw(url)[0] == 200
    assert raw(url, Authorization=None)[0] == 401 and raw(url, Authorization='Bearer x')[0] == 401
    for host in ('evil.example', f'evil.example:{url[-5:]}', '127.0.0.1.evil.example', '0.0.0.0'):
        assert raw(url, Host=host)[0] == 421, host
    for origin in ('http://evil.example', 'null', 'http://127.0.0.1:1'):
        assert raw(url, Origin=origin)[0] == 403, origin
    status, said = raw(url, 'POST', '/ask', None, Content_Length=str(LIMIT + 1))
    assert status == 413 and 'smaller picture' in said
    assert raw(url, 'POST', '/ask', None, Transfer_Encoding='chunked')[0] == 411
    for path in ('/../fada/serve.py', '/%2e%2e/%2e%2e/etc/passwd', '/docs', '/openapi.json', '/static/settings.ini'):
        assert raw(url, path=path)[0] == 404, path


@pytest.mark.parametrize(
    'body,said',
    [
        (b'{', 'not valid JSON'),
        (b'[]', 'not a JSON object'),
        (b'{"image": "http://127.0.0.1/x.png"}', 'an image by address'),
        (b'{"image": "file:///etc/passwd"}', 'an image by address'),
        (b'{"image": "data:image/png;base64,AAAA"}', 'not a readable image'),
        (b'{"image": "data:image/png;base64,AAAA", "questions": [true]}', 'a list of texts'),
        (b'{"session": "guess"}', 'no such session'),
    ],
)
def test_bad_orders_are_one_sentence(server, body, said):
    status, text = raw(server[0], 'POST', '/ask', body)
    assert status == 400 and said in json.loads(text)['error']['message'] and 'Traceback' not in text


def test_unknown_model_no_question_and_a_foreign_history(server, picture):
    m = Served(server[0], TOKEN, 'blip2-nan')
    with pytest.raises(FadaError, match='did you mean blip2-nano'):
        m.ask(picture, 1)
    with pytest.raises(FadaError, match='no question'):
        Served(server[0], TOKEN).ask(picture, [])
    one, two = Served(server[0], TOKEN), Served(server[0], TOKEN)
    one.ask(picture, 6)
    assert len(one.history()) == 1 and two.history() == []
    two.session = secrets.token_urlsafe(24)
    with pytest.raises(FadaError, match='no such session'):
        two.history()
    with pytest.raises(FadaError, match='a token is needed'):
        Served(server[0], 'wrong')
    with pytest.raises(FadaError, match='does not answer'):
        Served(f'http://127.0.0.1:{free_port()}', TOKEN)


def test_the_openai_client_speaks_with_it(server, picture):
    "Their own SDK, plain and streamed, gets the answers of the loaded model"
    from openai import OpenAI

    client = OpenAI(base_url=f'{server[0]}/v1', api_key=TOKEN, max_retries=0)
    assert [m.id for m in client.models.list()] == ['blip2-nano']
    messages = [
        dict(
            role='user',
            content=[
                dict(type='image_url', image_url=dict(url=data_url(picture))),
                dict(type='text', text='Which anatomical structures are seen?'),
            ],
        )
    ]
    whole = client.chat.completions.create(model='blip2-nano', messages=messages).choices[0].message.content
    parts = [
        c.choices[0].delta.content or ''
        for c in client.chat.completions.create(model='blip2-nano', messages=messages, stream=True)
    ]
    assert whole == ''.join(parts) == Served(server[0], TOKEN).ask(picture, 'structures').text and len(parts) > 3


def test_cancel_and_a_reader_who_leaves(server, picture):
    "Cancelled by its id in mid-stream, or by closing the connection: the order ends, the next is served"
    m = Served(server[0], TOKEN)
    seen = []
    for e in m.events(picture, ['Which anatomical structures are seen?']):
        seen.append(e['event'])
        if e['event'] == 'queued':
            m.call('DELETE', f"/ask/{e['id']}")
    assert seen[-1] == 'cancelled'
    s = m.stream(picture, 'structures')
    next(iter(s))
    s.events.close()
    start = time.perf_counter()
    assert m.ask(picture, 6).text and time.perf_counter() - start < 10


def test_maps_are_those_of_the_loaded_model(server, picture, nano):
    """By every method, of a grey picture too: the numbers, the tokens, the badge and where it lies; what is shown
    as colour is the picture"""
    import numpy as np
    from fada.explain import explain, methods

    vlm, m = nano, Served(server[0], TOKEN)
    assert m.methods() == methods(vlm) and len(m.methods()) >= 4
    whole = vlm.ask(picture, 'structures').text
    for method in m.methods():
        answer = (
            'femur' if method == 'integrated gradients' else whole
        )  # a pass back for each token at each of its steps
        here, there = (
            explain(vlm, picture, 'structures', answer, method),
            explain(m, picture, 'structures', answer, method),
        )
        assert (
            there.tokens == here.tokens
            and there.badge == here.badge != ''
            and there.units == here.units
            and there.box == pytest.approx(here.box)
        )
        np.testing.assert_allclose(
            there.heat,
            here.heat,
            rtol=2e-3,
            atol=max(1e-6 * np.nanmax(np.abs(here.heat)), ROUNDING if here.units == 'fall of log-probability' else 0),
        )
        assert (there.per_token is None) == (here.per_token is None)
        if here.per_token is not None:
            np.testing.assert_allclose(
                there.per_token, here.per_token, rtol=2e-3, atol=1e-4 * np.nanmax(np.abs(here.per_token))
            )
    grey = m.explain(picture.convert('L'), 6, 'good')
    assert grey.image.shape == (*picture.size[::-1], 3)


@pytest.mark.parametrize(
    'more,said',
    [
        (dict(method='magic'), "no map by 'magic'"),
        (dict(method=3), 'question, answer or method'),
        (dict(answer=None), 'question, answer or method'),
        (dict(question=['a']), 'question, answer or method'),
        (dict(question=True), 'question, answer or method'),
        (dict(question=99), '99'),
        (dict(answer=''), ''),
        (dict(image='file:///etc/passwd'), 'an image by address'),
        (dict(image=None), ''),
        (dict(model='blip2-nan'), 'did you mean blip2-nano'),
    ],
)
def test_bad_orders_of_maps_are_one_sentence(server, picture, more, said):
    body = json.dumps(dict(image=data_url(picture), question=6, answer='good') | more).encode()
    status, text = raw(server[0], 'POST', '/maps', body)
    words = json.loads(text)['error']['message']
    assert status == 400 and said in words and words and 'Traceback' not in text


def test_eight_clients_get_their_own_maps(server, nano):
    """Answers and maps at the same time: each client gets the map of its own picture; nobody reads the order of
    another"""
    import numpy as np
    from fada.explain import explain
    from fada.phantoms import make_phantom

    pictures = [Image.fromarray(make_phantom('Femur', (98, k, 0)).image).convert('RGB') for k in range(8)]
    wanted = [explain(nano, p, 6, 'good').heat for p in pictures]
    got, words = [None] * 8, [None] * 8

    def client(k):
        m = Served(server[0], TOKEN)
        words[k] = m.ask(pictures[k], 6).text
        got[k] = m.explain(pictures[k], 6, 'good').heat

    threads = [threading.Thread(target=client, args=(k,)) for k in range(8)]
    [t.start() for t in threads]
    [t.join(120) for t in threads]
    assert all(words)
    for k in range(8):
        far = [np.abs(got[k] - w).max() for w in wanted]
        assert int(np.argmin(far)) == k and far[k] < 1e-2 * np.abs(wanted[k]).max(), (k, far)
    assert (
        raw(server[0], 'GET', '/maps')[0] == 405
        and raw(server[0], 'GET', f'/maps/{secrets.token_urlsafe(12)}')[0] == 404
    )
    assert (
        raw(server[0], 'DELETE', f'/ask/{secrets.token_urlsafe(12)}')[0] == 400
        and raw(server[0], 'POST', '/maps', b'{}', Authorization='Bearer x')[0] == 401
    )


def test_a_map_nobody_waits_for_is_not_drawn(server, picture):
    "A client that leaves while its order waits costs no turn"
    m = Served(server[0], TOKEN)
    turn = lambda: next(e['turn'] for e in m.events(picture, [6]) if e['event'] == 'thinking')
    before = turn()
    slow = [
        threading.Thread(target=m.explain, args=(picture, 'structures', 'femur', 'occlusion, blur'))
        for _ in range(12)
    ]
    [t.start() for t in slow]
    time.sleep(0.3)
    body = json.dumps(dict(image=data_url(picture), question=6, answer='good', method='occlusion, blur')).encode()
    c = http.client.HTTPConnection(server[0].split('//')[1], timeout=60)
    c.request('POST', '/maps', body, {'Authorization': f'Bearer {TOKEN}'})
    time.sleep(0.3)
    c.close()
    [t.join(120) for t in slow]
    assert turn() == before + 13  # twelve maps and this question


@pytest.mark.slow
def test_fifty_clients_in_order_and_one_who_does_not_read(server, picture):
    "All are answered, in order of arrival; a client that never reads blocks nobody; memory stays flat"
    url = server[0]
    host = url.split('//')[1]
    body = json.dumps(dict(image=data_url(picture), questions=['How is the image quality?'])).encode()

    def send():
        c = http.client.HTTPConnection(host, timeout=120)
        c.request('POST', '/ask', body, {'Authorization': f'Bearer {TOKEN}'})
        return c

    lazy = send()
    worker = max(psutil.Process(server[1].pid).children(recursive=True), key=lambda p: p.memory_info().rss)
    finished, turns = [], []

    def follow(k, c):
        began = None
        for line in c.getresponse():
            if line.startswith(b'data: '):
                e = json.loads(line[6:])
            elif line.startswith(b'event: token') and began:
                turns.append(time.perf_counter() - began)
                began = None
            if line.startswith(b'data: ') and e['event'] == 'queued':
                ticket = e['ticket']
            if line.startswith(b'data: ') and e['event'] == 'thinking':
                began = time.perf_counter()
                turn = e['turn']
            if line.startswith(b'data: ') and e['event'] == 'done':
                finished.append((ticket, turn, k))

    def round():
        finished.clear()
        threads = []
        for k in range(50):
            threads.append(threading.Thread(target=follow, args=(k, send())))
            time.sleep(0.02)
            threads[-1].start()
        for t in threads:
            t.join(120)
        return sorted(finished)

    first = round()
    before = worker.memory_info().rss
    second = round()
    after = worker.memory_info().rss
    for got in (first, second):
        tickets, served, sent = zip(*got)
        assert sorted(sent) == list(range(50)) and list(served) == sorted(served)  # first come, first served
        assert (
            sum(abs(k - i) for i, k in enumerate(sent)) / 50 < 5
        )  # and came about as they were sent: pictures are read beside each other
    assert max(turns) < 2 and after - before < 30_000_000
    lazy.close()


@pytest.mark.fault
def test_killed_in_the_middle_and_back(server, picture):
    "The client is told; the server comes back by itself and answers"
    url, p, _ = server
    m = Served(url, TOKEN)
    child = psutil.Process(p.pid).children()[0]
    told = False
    try:
        for e in m.events(picture, ['Which anatomical structures are seen?']):
            if e['event'] in ('thinking', 'token'):
                child.kill()
    except FadaError as e:
        told = 'went away' in str(e)
    assert told or e['event'] == 'done'  # it may have been quicker than the kill
    child.wait(10)
    wait_for(int(url.rsplit(':', 1)[1]))
    assert m.ask(picture, 6).text and len(m.history()) == 1
    assert 'started again' in (server[2] / 'err').read_text()


def test_sessions_keep_the_newest_and_their_last_rows():
    "The longest unused session goes beyond `most`; a history keeps its last rows"
    from fada.serve import Desk, Sessions

    s = Sessions(most=2, rows=3)
    a = s.open()
    b = s.open()
    s.of(a).extend(range(5))
    c = s.open()  # a was used after b
    assert s.of(a) == [2, 3, 4] and s.of(c) == [] and len({a, b, c}) == 3
    with pytest.raises(FadaError, match='no such session'):
        s.of(b)
    with pytest.raises(FadaError, match='no such session'):
        Desk(None).sessions.of('')


def test_a_served_stream_puts_the_events_together():
    """Pieces are yielded with their question's number, whole answers replace them, what was not answered is called
    cancelled"""
    from fada.serve import ServedStream, answer_record
    from fada.vlm import Answer

    whole = answer_record(Answer('How is the image quality?', 'good', 6))
    sent = [
        dict(event='token', number=0, text='go'),
        dict(event='token', number=1, text='th'),
        dict(event='token', number=0, text='od'),
        dict(event='answer', **whole),
        dict(event='cancelled'),
    ]

    class Served:
        def events(self, image, questions, stop):
            for e in sent:
                if stop():
                    return
                yield e

    told = []
    s = ServedStream(Served(), None, [6, 'Why?'], False)
    s.tell = told.append
    assert list(s) == [(0, 'go'), (1, 'th'), (0, 'od')] and told == sent
    assert s.answer.text == 'good' and s.answers[1].text == 'th' and [a.error for a in s.answers] == ['', 'cancelled']
    s = ServedStream(Served(), None, [6], True)
    pieces = []
    for p in s:
        pieces.append(p)
        s.cancel()
    assert pieces == ['go'] and s.answer.error == 'cancelled'


def test_a_server_that_crashes_is_started_again_and_given_up(tmp_path, monkeypatch):
    "Five crashes within a minute are enough; an ordinary error is not tried again"
    from fada.serve import supervise

    program = tmp_path / 'server'
    runs = tmp_path / 'runs'
    monkeypatch.setattr(sys, 'executable', str(program))
    said = []
    before = signal.getsignal(signal.SIGTERM)
    try:
        for code, times in ((3, 5), (1, 1), (0, 1)):
            runs.write_text('')
            program.write_text(f'#!/bin/sh\necho "$4 $FADA_TOKEN" >> {runs}\nexit {code}\n')
            program.chmod(0o755)
            assert supervise(9, 'secret', say=said.append) == (0 if code == 0 else 1)
            assert runs.read_text().splitlines() == [f'{os.getpid()} secret'] * times
    finally:
        signal.signal(signal.SIGTERM, before)
    assert said == ['the server ended with status 3: started again'] * 4 + [
        'error: the server crashed 5 times within a minute, the last time with status 3'
    ]


def test_a_server_that_is_stopped_before_it_began_leaves_quietly(monkeypatch):
    "Ctrl-C may come before there is a process to end"
    from fada import serve

    def stopped(*a, **k):
        raise KeyboardInterrupt

    monkeypatch.setattr(serve.subprocess, 'Popen', stopped)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert serve.supervise(9, 'secret', say=pytest.fail) == 130
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_page_at_a_taken_port_is_not_started(root, monkeypatch):
    "Neither the page's port nor the model's next to it may be somebody else's; an unknown model is said before"
    from fada.app import run_app
    from fada.cli import web_app

    notebook = root / 'nbs' / 'app' / 'ask.ipynb'
    monkeypatch.setenv('FADA_QUIET', '1')
    monkeypatch.chdir(root)
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        s.listen()
        port = s.getsockname()[1]
        for first in (port, port - 1):
            with pytest.raises(FadaError, match=f'port {port} is taken'):
                run_app(notebook, first, False, say=pytest.fail)
        with pytest.raises(FadaError, match=f'port {port} is taken'):
            web_app(port, False, quiet=True)
    with pytest.raises(FadaError, match='blip2-nanno'):
        web_app(port, False, model='blip2-nanno', quiet=True)


def test_a_server_without_its_packages_says_what_to_install(monkeypatch):
    from fada import serve

    monkeypatch.setattr(serve, 'find_spec', lambda name: None)
    with pytest.raises(FadaError, match=r"fastapi or uvicorn is not installed.*fada\[app\]"):
        serve.run_server(free_port())
