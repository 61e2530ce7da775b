"""What a panel offers with a model in its own kernel it offers over a server too: adapters by image, closed sets,
maps that can be stopped. Real servers on loopback."""

import json, os, shutil, signal, subprocess, threading, time
import numpy as np
import pytest
from PIL import Image
from commands import typed
from test_serve import TOKEN, free_port, raw, wait_for
from fada.ask import AskPanel, Picture, offered_here, offered_there
from fada.choices import CHOICES, Stopped
from fada.explain import explain
from fada.registry import ASSETS
from fada.serve import BEAT, Served, Worker, data_url, make_app
from fada.session import Session
from fada.settings import load_settings

SECOND = 1.5  # seconds within which Stop is felt on a machine that does other things too


@pytest.fixture(scope='module')
def project(small_data, tmp_path_factory):
    """A folder in which a base and two adapters were trained: they say something else than the base, and know their
    images"""
    import torch
    from safetensors.torch import load_file, save_file
    from fada.finetune import finetune
    from fada.vlm import load

    d = tmp_path_factory.mktemp('project')
    base = d / 'outputs' / 'run' / 'base' / 'model'
    shutil.copytree(ASSETS / 'blip2-nano', base)
    (d / 'settings.ini').write_text(
        '[model]\ndevice = cpu\nprecision = fp32\n[output]\nfolder = outputs\n[data]\nfolder = none\n'
    )
    for k, c in enumerate(('Femur', 'Abdomen')):
        out = d / 'outputs' / 'run' / f'lora-{c}' / 'adapter'
        vlm = load('blip2-nano', None, base, device='cpu', precision='fp32', max_new_tokens=16)
        finetune(vlm, small_data, [c], out, steps=4, batch=8, checks=1, validation_images=4, skip_preflight=True)
        g = torch.Generator().manual_seed(k)
        at = out / 'adapter_model.safetensors'
        save_file(
            {n: t + torch.randn(t.shape, generator=g) * 0.05 for n, t in load_file(at).items()}, at, dict(format='pt')
        )
    return d


@pytest.fixture(scope='module')
def server(project):
    "`fada serve` in that folder: its address"
    port = free_port()
    log = open(project / 'log', 'w')
    p = subprocess.Popen(
        typed('serve --port {port}', port=port),
        cwd=project,
        stdout=log,
        stderr=log,
        env=dict(os.environ, FADA_TOKEN=TOKEN, FADA_THREADS='1'),
        start_new_session=True,
    )
    wait_for(port)
    yield f'http://127.0.0.1:{port}'
    p.send_signal(signal.SIGINT)
    assert p.wait(30) == 130 and 'Traceback' not in (project / 'log').read_text()


@pytest.fixture(scope='module')
def pictures(small_data):
    "One of each category, and one that is unlike both"
    from fada.data import load_table, read_image

    t = load_table(small_data, split='test').drop_duplicates('category')
    found = {c: read_image(small_data / i).convert('RGB') for i, c in zip(t.image, t.category)}
    return found | dict(noise=Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)))


@pytest.fixture(scope='module')
def image():
    from fada.phantoms import make_phantom

    return Image.fromarray(make_phantom('Femur', (99, 1, 0)).image).convert('RGB')


@pytest.fixture(scope='module')
def both(project, server):
    "What is offered in the kernel, and over the server"
    with pytest.MonkeyPatch.context() as m:
        m.setenv('FADA_TOKEN', TOKEN)
        s = load_settings(project)
        yield offered_here(s), offered_there(server, s)


def panel_of(offered, pictures, folder):
    p = AskPanel(offered, [Picture(n, lambda i=i: i) for n, i in pictures.items()], Session(folder))
    p.closed.value = True
    return p


@pytest.mark.slow
def test_the_same_is_offered_and_answered(both, pictures, project, tmp_path):
    """Names, answers, confidence, probabilities of closed sets, proposed category, precision, maps, and what asks
    again"""
    here, there = both
    assert list(here) == list(there) and {'blip2-nano', 'blip2-nano + Femur', 'adapter by image'} <= set(here)
    one, two = (panel_of(o, pictures, tmp_path / n) for o, n in ((here, 'here'), (there, 'there')))
    proposed = {}
    for name in ('blip2-nano + Femur', 'adapter by image'):
        for label in pictures if 'image' in name else ['Femur']:
            for p in (one, two):
                p.which.value, p.pick.value = name, label
                p.eight.click()
                p.wait()
                assert 'done' in p.state.value, p.state.value
            said = lambda p: [{k: r['said'][0][k] for k in ('text', 'reason', 'note', 'maps')} for r in p.rows]
            assert (
                said(one) == said(two)
                and sum('closed set: ' in r['note'] for r in said(two)) >= 1
                and one.about.value == two.about.value
            )
            assert one.method.options == two.method.options
            proposed[name, label] = two.about.value, two.session.turns[-1].model
            assert one.session.turns[-1].model == two.session.turns[-1].model
    assert (
        'fp32' in proposed['blip2-nano + Femur', 'Femur'][0]
        and '· adapter' in proposed['blip2-nano + Femur', 'Femur'][0]
    )
    told, again = proposed['adapter by image', 'noise']
    assert 'unlike the training images of every adapter' in told and again['adapter'] is None
    ways = [proposed['adapter by image', c] for c in ('Femur', 'Abdomen')]
    assert any(
        'proposed: nearest to the training images of' in told
        and again['adapter'].endswith(f"lora-{told.split('images of ')[1].split()[0]}/adapter")
        for told, again in ways
    ), ways

    asks_again(two, project, tmp_path)
    two.which.value, two.beside.value = 'adapter by image', 'blip2-nano + Femur'
    two.run([6])
    two.wait()
    lines = two.about.value.split('<br>')
    assert (
        len(lines) == 2 and 'the training images of' in lines[0] and 'blip2-nano + Femur' in lines[1]
    )  # who proposed what stays to be read


def asks_again(panel, project, tmp_path):
    """The exported notebook finds weights and adapters below the folder that it is told, though no path of this
    machine is in it"""
    import zipfile
    from fada.session import AGAIN, ASK_AGAIN

    panel.write()
    to = tmp_path / 'unpacked'
    zipfile.ZipFile(panel.session.folder / 'session.zip').extractall(to)
    assert not [p for p in to.rglob('*.*') if p.suffix != '.png' and str(project) in p.read_text()]
    space = {}
    exec(
        (AGAIN + '\n' + ASK_AGAIN)
        .replace("Path('.')", repr_path(to))
        .replace("Path('outputs')", repr_path(project / 'outputs')),
        space,
    )
    assert (
        len(space['models']) >= 2
        and space['again'].same[space['again'].pixels == 'as asked'].all()
        and space['again'].same.mean() > 0.8
    )


def repr_path(p):
    return f'Path({str(p)!r})'


@pytest.mark.slow
def test_routes_of_choices_and_proposals(both, server, pictures, project, monkeypatch):
    "The client's calls and the plain HTTP bodies give what the loaded model gives, whoever asked before"
    here, there = both
    mine, served = here['adapter by image'].open(), there['adapter by image'].open()
    seen = set()
    for image in pictures.values():
        mine.by(image)
        assert served.propose(image) == mine.route
        seen.add(mine.route.adapter)
        for q in CHOICES:
            a, b = mine.choose(image, q), served.choose(image, q)
            assert (a.question, a.text) == (b.question, b.text) and b.probability == pytest.approx(
                a.probability, abs=1e-5
            )
        a, b = explain(mine, image, 6, 'good'), explain(served, image, 6, 'good')
        np.testing.assert_allclose(b.heat, a.heat, rtol=2e-3, atol=1e-6)
        assert a.badge == b.badge
    assert len(seen) > 1
    image = pictures['Femur']
    own = served.choose(image, 'Which side?', ['left', 'right'])
    assert set(own.probability) == {'left', 'right'} and sum(own.probability.values()) == pytest.approx(1)
    body = dict(image=data_url(image), model='blip2-nano/by-image')
    status, text = raw(server, 'POST', '/route', json.dumps(body).encode())
    assert status == 200 and set(json.loads(text)) == {'adapter', 'why', 'category', 'unlike'}
    status, text = raw(server, 'POST', '/choices', json.dumps(body | dict(question=6, stream=True)).encode())
    assert 'event: choice' in text and 'event: done' in text
    rows = json.loads(raw(server)[1])['data']
    assert {r['id']: r['label'] for r in rows}['blip2-nano/by-image'] == 'adapter by image' and all(
        r['maps'] for r in rows
    )


@pytest.mark.parametrize(
    'path,more,said',
    [
        ('/route', dict(), 'by-image'),
        ('/route', dict(model='x'), 'unknown model'),
        ('/route', dict(image='file:///etc/passwd'), 'an image by address'),
        ('/choices', dict(), 'question or choices'),
        ('/choices', dict(question=True), 'question or choices'),
        ('/choices', dict(question=6, choices='good'), 'question or choices'),
        ('/choices', dict(question=6, choices=[1, 2]), 'question or choices'),
        ('/choices', dict(question=1), 'two or more texts'),
        ('/choices', dict(question=6, choices=['good']), 'two or more texts'),
        ('/choices', dict(question=6, choices=['good', 'good: noise']), 'none of which begins another'),
        ('/choices', dict(question='<img src=x>'), 'two or more texts'),
    ],
)
def test_bad_orders_are_one_sentence(desk, path, more, said):
    server, image = desk[0], Image.new('RGB', (64, 48), 'gray')
    body = json.dumps(dict(image=data_url(image)) | more).encode()
    status, text = raw(server, 'POST', path, body)
    assert status == 400 and said in json.loads(text)['error']['message'] and 'Traceback' not in text
    assert (
        raw(server, 'POST', path, body, Authorization='Bearer x')[0] == 401
        and raw(server, 'POST', path, body, Origin='http://evil.example')[0] == 403
    )


class Slowly:
    "The embedded model, each pass of its vision tower some seconds longer: a map takes its time"

    def __init__(self, vlm, seconds=0.2):
        self.tower, self.seconds, self.passes = vlm.core.vision_model, seconds, 0

    def __enter__(self):
        def slow(*_):
            self.passes += 1
            time.sleep(self.seconds)

        self.hook = self.tower.register_forward_hook(slow)
        return self

    def __exit__(self, *_):
        self.hook.remove()


@pytest.fixture(scope='module')
def desk():
    "A server in this process, so that its model can be made slow: (address, loaded model, worker)"
    import uvicorn

    s = load_settings(model='blip2-nano', device='cpu', precision='fp32')
    w = Worker(s)
    vlm = w.model(w.names['blip2-nano'])
    port = free_port()
    u = uvicorn.Server(uvicorn.Config(make_app(w, TOKEN), host='127.0.0.1', port=port, log_level='error'))
    t = threading.Thread(target=u.run, daemon=True)
    t.start()
    wait_for(port)
    yield f'http://127.0.0.1:{port}', vlm, w
    u.should_exit = True
    t.join(20)
    w.close()


def until(true, seconds=20):
    end = time.perf_counter() + seconds
    while not true():
        assert time.perf_counter() < end
        time.sleep(0.01)
    return time.perf_counter()


@pytest.mark.parametrize('there', [False, True], ids=['in the kernel', 'through the server'])
@pytest.mark.parametrize('method', ['occlusion, blur', 'integrated gradients'])
def test_stop_ends_a_map_under_way(desk, image, tmp_path, monkeypatch, there, method):
    """Within about a second, said so; Ask is free again; the next answer and the next map are those of a model that
    was never stopped"""
    url, vlm, worker = desk
    monkeypatch.setenv('FADA_TOKEN', TOKEN)
    s = load_settings(model='blip2-nano', device='cpu', precision='fp32')
    p = panel_of(offered_there(url, s) if there else offered_here(s), dict(one=image), tmp_path)
    p.which.value = 'blip2-nano'
    p.run([6])
    p.wait()
    mine = vlm if there else p.held['blip2-nano']
    wanted = explain(mine, image, 6, p.rows[0]['said'][0]['answer'], 'relevancy')
    p.method.value = method
    with Slowly(mine) as slow:
        p.told(dict(kind='where', row=0, side=0))
        until(lambda: slow.passes > 1)
        assert 'drawing the map' in p.state.value and (p.ask.disabled, p.stop.disabled) == (True, False)
        start = time.perf_counter()
        p.stop.click()
        p.wait()
        took = time.perf_counter() - start
        done = slow.passes
        assert (
            took < SECOND
            and 'stopped before the map was drawn' in p.state.value
            and (p.ask.disabled, p.stop.disabled) == (False, True)
            and not p.views[0].heat
        )
        time.sleep(0.8)
        assert slow.passes <= done + 2  # nothing goes on behind the panel's back
    p.method.value = 'relevancy'
    p.told(dict(kind='where', row=0, side=0))
    p.wait()
    assert 'done' in p.state.value
    heat = np.frombuffer(p.views[0].heat, np.float32)[: wanted.heat.size]
    np.testing.assert_allclose(heat, wanted.heat.ravel(), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize('there', [False, True], ids=['in the kernel', 'through the server'])
def test_stop_before_the_first_token(desk, image, tmp_path, monkeypatch, there):
    """An image that takes seconds to be read: Stop is felt at the next layer, not after the last; asked again, it
    answers"""
    url, vlm, _ = desk
    monkeypatch.setenv('FADA_TOKEN', TOKEN)
    s = load_settings(model='blip2-nano', device='cpu', precision='fp32')
    other = image.rotate(90 if there else 180)
    p = panel_of(offered_there(url, s) if there else offered_here(s), dict(one=other), tmp_path)
    mine = vlm if there else p.open('blip2-nano')
    read = []
    layers = mine.core.vision_model.encoder.layers
    hooks = [m.register_forward_hook(lambda *_: (read.append(1), time.sleep(0.4)) and None) for m in layers]
    assert 0.4 * len(layers) > SECOND
    try:
        p.run([6])
        until(lambda: read)
        start = time.perf_counter()
        p.stop.click()
        p.wait()
        took = time.perf_counter() - start
        time.sleep(0.5)
        assert (
            took < SECOND
            and 'stopped' in p.state.value
            and len(read) < len(layers)
            and p.rows[0]['said'][0]['error'] == 'cancelled'
        ), (took, len(read))
    finally:
        [h.remove() for h in hooks]
    p.run([6])
    p.wait()
    assert 'done' in p.state.value and p.rows[0]['said'][0]['text'] == vlm.ask(other, 6).text


def test_stop_in_the_queue(desk, image, tmp_path, monkeypatch):
    """Behind the long map of another client, an answer, a closed set and a map are given up at once; the other gets
    its map"""
    url, vlm, worker = desk
    monkeypatch.setenv('FADA_TOKEN', TOKEN)
    other = Served(url)
    got = []
    s = load_settings(model='blip2-nano', device='cpu', precision='fp32')
    p = panel_of(offered_there(url, s), dict(one=image), tmp_path)
    p.run([6])
    p.wait()
    with Slowly(vlm, 1.0) as slow:
        t = threading.Thread(target=lambda: got.append(other.explain(image, 1, 'femur', 'occlusion, blur')))
        t.start()
        until(lambda: slow.passes > 1)
        stop = threading.Event()
        for act in (lambda: p.told(dict(kind='where', row=0, side=0)), lambda: p.run([6])):
            act()
            time.sleep(2 * BEAT)
            start = time.perf_counter()
            p.stop.click()
            p.wait()
            assert time.perf_counter() - start < SECOND and 'stopped' in p.state.value, p.state.value
        threading.Timer(0.3, stop.set).start()
        start = time.perf_counter()
        with pytest.raises(Stopped):
            Served(url).choose(image, 6, stop=stop.is_set)
        assert time.perf_counter() - start < 0.3 + SECOND and t.is_alive()
        events = other.follow(
            '/maps', image, dict(question=6, answer='good')
        )  # by its id: said at once, not when its turn comes
        first = next(events)
        assert (
            other.call('DELETE', f'/ask/{first["id"]}')['cancelled']
            and [e['event'] for e in events] == ['cancelled']
            and t.is_alive()
        )
        t.join(60)
    assert np.nanmax(got[0].heat) > 0
