"""The ask panel on hard ground: what leaves the machine, what an export holds, and, in a real JupyterLab, a cine
and a service whose answers are markup."""

import io, json, re, sys, time, zipfile
from pathlib import Path
import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from services import Door, picture, reply
from test_browser import _open, browser, lab, shots  # noqa: F401  fixtures
from fada.ask import AskPanel, Picture, offered_here, uploaded
from fada.session import Session
from fada.settings import load_settings

BAIT = '<img src=x onerror="document.title=1">'
SECRETS = ('DOE', 'JANE', 'Doe', 'Jane', 'HIDDEN-7', 'SN-4711', '19900101', 'St. Elsewhere')


def cine(frames=5, side=96):
    "Frames of a sector in which a bright bar wanders"
    y, x = np.mgrid[:side, :side]
    out = []
    for k in range(frames):
        a = np.where((y > 8) & (abs(x - side / 2) < 8 + y * 0.45), 40, 0).astype(np.uint8)
        a[30:60, 20 + 10 * k : 26 + 10 * k] = 220
        out.append(a)
    return np.stack(out)


def write_dicom(path, frames):
    "A multi-frame ultrasound file with a scale, a patient, and private tags"
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, UltrasoundMultiFrameImageStorage, generate_uid

    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = UltrasoundMultiFrameImageStorage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.Modality = 'DOE^JANE', 'Doe-1', '19900101', 'US'
    ds.InstitutionName, ds.DeviceSerialNumber = 'St. Elsewhere', 'SN-4711'
    block = ds.private_block(0x0011, 'ACME JANE', create=True)
    block.add_new(1, 'LO', 'HIDDEN-7')
    block.add_new(2, 'PN', 'Doe^Jane')
    ds.NumberOfFrames, ds.Rows, ds.Columns = frames.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, 'MONOCHROME2'
    ds.BitsAllocated = ds.BitsStored = 8
    ds.HighBit, ds.PixelRepresentation = 7, 0
    ds.PixelData = frames.tobytes()
    r = Dataset()
    r.RegionLocationMinX0 = r.RegionLocationMinY0 = 0
    r.RegionLocationMaxX1, r.RegionLocationMaxY1 = frames.shape[2] - 1, frames.shape[1] - 1
    r.PhysicalUnitsXDirection = r.PhysicalUnitsYDirection = 3
    r.PhysicalDeltaX = r.PhysicalDeltaY = 0.02
    r.RegionSpatialFormat = r.RegionDataType = 1
    r.RegionFlags = 0
    ds.SequenceOfUltrasoundRegions = [r]
    ds.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture(scope='module')
def settings(tmp_path_factory):
    d = tmp_path_factory.mktemp('panel')
    (d / 'settings.ini').write_text('[output]\nfolder = outputs\n[data]\nfolder = none\n')
    return load_settings(d)


@pytest.fixture(scope='module')
def nano(settings):
    return offered_here(settings)


def asked(panel, *questions):
    panel.run(list(questions))
    panel.wait()
    return panel.state.value


class Speaks:
    "A model that says a text piece by piece, or as a whole as services do"

    def __init__(self, text, core='here', asked=None):
        self.text, self.core, self.asked, self.spec, self.base = text, core, [] if asked is None else asked, None, ''

    def answers(self, questions, text):
        from fada.clinical import QUESTIONS
        from fada.vlm import Answer

        return [
            Answer(QUESTIONS[q].text if q in QUESTIONS else q, text, q if q in QUESTIONS else None) for q in questions
        ]

    def ask(self, image, questions):
        self.asked.append(questions)
        return self.answers(questions, self.text)

    def stream(self, image, questions):
        class Stream:
            answers = self.answers(questions, '')
            cancel = lambda self: setattr(self, 'gone', True)

            def __iter__(s):
                for k in range(len(self.text)):
                    time.sleep(0.01)
                    s.answers = self.answers(questions, self.text[: k + 1])
                    if getattr(s, 'gone', False):
                        for a in s.answers:
                            a.error = 'cancelled'
                        return
                    yield 0, self.text[k]

        return Stream()


def of(tmp_path, frame, **models):
    "A panel without maps over made models"
    from fada.ask import Offered

    panel = AskPanel(
        {n: Offered(lambda m=m: m, receivers=[f'host-{n}'] if m.core is None else []) for n, m in models.items()},
        [Picture('x', lambda: frame), Picture('y', lambda: frame)],
        Session(tmp_path / 's'),
        remote=True,
    )
    panel._tell_methods = lambda models: None
    return panel


def test_consent_is_for_the_host_that_was_named(tmp_path):
    "Another model or another picture meanwhile: the word is withdrawn, nothing is sent to anybody"
    frame = Image.fromarray(cine(1)[0]).convert('RGB')
    panel = of(tmp_path, frame, a=Speaks('good', None), b=Speaks('good', None))
    for elsewhere in (lambda: setattr(panel.which, 'value', 'b'), lambda: setattr(panel.pick, 'value', 'y')):
        panel.run([6])
        assert panel.consent.layout.display == ''
        elsewhere()
        assert panel.consent.layout.display == 'none'
        panel.consented(True)
        panel.wait()
        assert 'not sent' in panel.state.value and not panel.agreed and not panel.session.turns


def test_what_is_barred_is_not_shown_while_it_grows(tmp_path):
    """Neither the sex nor millimetres without a scale stand on the page for a moment; what was accepted is what was
    shown"""
    frame = Image.fromarray(cine(1)[0]).convert('RGB')
    panel = of(tmp_path, frame, one=Speaks('31 mm, and a boy, as I see it'))
    seen = []
    panel.answers.observe(lambda c: seen.extend(x['text'] for r in c['new'] for x in r['said']), 'rows')
    panel.run(['What lies here?'])
    panel.wait()
    assert len(seen) > 2 and not [t for t in seen if 'boy' in t or 'mm' in t], seen
    panel = of(tmp_path / 't', frame, one=Speaks('31 mm long'))
    panel.who.value = 'Ada'
    panel.run(['How long?'])
    panel.wait()
    panel.told(dict(kind='accept', row=0, side=0))
    (j,) = panel.session.judgements()
    assert (j['prediction'], j['shown'], j['final']) == ('31 mm long', 'not determinable', 'not determinable')


def test_stop_keeps_the_picture_here(tmp_path):
    "A local model beside a service, stopped during the first: the service is not asked"
    frame = Image.fromarray(cine(1)[0]).convert('RGB')
    far = Speaks('good', None)
    panel = of(tmp_path, frame, near=Speaks('good' * 40), far=far)
    panel.beside.value = 'far'
    panel.agreed = {'host-far'}
    panel.run([6])
    time.sleep(0.2)
    panel.cancel()
    panel.wait()
    assert far.asked == [] and 'stopped' in panel.state.value


def test_words_about_sex_and_weeks():
    from fada.session import about_sex, cannot_be_known

    assert all(
        map(
            about_sex,
            ('external genitalia appear masculine', 'phallus seen', 'It is a son.', 'Are the genitalia visible?'),
        )
    )
    assert not any(map(about_sex, ('the sonogram is good', 'reason: low gain', 'personal')))
    assert (
        cannot_be_known(None, 'repeat the scan in 4 weeks') == ''
        and cannot_be_known(None, '22 weeks of gestation')
        and cannot_be_known(None, '22 weeks old')
    )


def test_an_export_holds_nobody(nano, settings, tmp_path):
    """Patient, private tags and file name of a DICOM are in no file of the export; frame and scale are; frames are
    told apart"""
    path = write_dicom(tmp_path / 'Doe_Jane_19900101.dcm', cine())
    p = uploaded(path.name, path.read_bytes())
    assert p.mm_per_px == pytest.approx(0.2) and len(p.get()) == 5
    panel = AskPanel(nano, [p], Session(tmp_path / 'session'))
    panel.who.value = 'Ada'
    assert 'done' in asked(panel, 6)
    panel.views[0].frame = 3
    assert 'done' in asked(panel, 6, 'Is <b>Jane</b> here?'.replace('Jane', 'it'))
    panel.told(dict(kind='accept', row=0, side=0))
    panel.write()
    kept = panel.session.turns
    assert (
        [t.frame for t in kept] == [0, 3, 3]
        and kept[0].pixels_sha256 != kept[1].pixels_sha256
        and kept[0].mm_per_px == pytest.approx(0.2)
    )
    with zipfile.ZipFile(tmp_path / 'session' / 'session.zip') as z:
        files = {n: z.read(n) for n in z.namelist()}
    assert {'again.ipynb', 'answers.csv', 'turns.jsonl', 'corrections.jsonl'} < set(files) and sum(
        n.endswith('.png') for n in files
    ) == 2
    for name, data in files.items():
        for secret in SECRETS:
            assert secret.encode() not in data and secret not in name, (secret, name)
        if name.endswith('.png'):
            assert not Image.open(tmp_path / 'session' / name).info


def test_markup_stays_text_wherever_it_goes(nano, tmp_path):
    "In image name, question, judge and file name: no `<img` reaches a widget that renders markup"
    import ipywidgets as w

    frame = Image.fromarray(cine()[0]).convert('RGB')
    panel = AskPanel(
        {f'a{BAIT}': next(iter(nano.values()))},
        [Picture(f'x{BAIT}', lambda: frame, {6: BAIT})],
        Session(tmp_path / 's'),
    )
    asked(panel, f'{BAIT} ?', 6)
    panel.who.value = BAIT
    panel.told(dict(kind='edit', row=1, side=0, text=BAIT))
    panel.write()
    panel.told(dict(kind='accept', row=7, side=0))
    panel.told(dict(kind='edit', row=1, side=0, text=''))
    assert panel.about.value
    panel.change()
    assert not panel.about.value

    def every(x):
        return [x, *(y for c in getattr(x, 'children', ()) for y in every(c))]

    pages = [x.value for x in every(panel.widget) if isinstance(x, w.HTML)]
    assert len(pages) >= 5
    assert not any(re.search('<img', h) for h in pages) and sum('&lt;img' in h for h in pages) >= 2


def test_what_is_not_known_is_not_shown_as_known(nano, tmp_path):
    """Millimetres without scale, an age without dates, the sex of a fetus: not determinable, with the reason; the
    model is not asked about sex"""
    from fada.vlm import Answer

    class Sure:
        core = None
        spec = None

        def ask(self, image, questions):
            self.asked = list(questions)
            return [Answer('q', said[q], q if isinstance(q, int) else None, confidence=0.9) for q in questions]

    said = {
        4: 'femur length, 31 mm',
        5: '22 weeks',
        7: 'growth restriction',
        6: 'good',
        'What is it?': 'a boy',
        'How long?': 'the femur has 31.5 mm',
    }
    sure = Sure()
    offer = nano['blip2-nano'].__class__(lambda: sure)
    frame = Image.fromarray(cine()[0]).convert('RGB')
    panel = AskPanel({'sure': offer}, [Picture('x', lambda: frame)], Session(tmp_path / 's'))
    panel._tell_methods = lambda vlm: None
    asked(panel, *said, 'Is it a girl?')
    assert 'Is it a girl?' not in sure.asked
    rows = {r['question']: r['said'][0] for r in panel.rows}
    text = {k: v['text'] for k, v in rows.items()}
    assert [t for t in text.values()].count('not determinable') >= 5 and rows['How is the image quality?'][
        'text'
    ] == 'good'
    assert (
        'scale' in rows['Which biometric measurements can be taken?']['reason']
        and '31 mm' in rows['Which biometric measurements can be taken?']['note']
    )
    assert 'fetal_sex' in rows['Is it a girl?']['reason'] and 'fetal_sex' in rows['What is it?']['reason']
    assert 'boy' not in json.dumps([t.__dict__ for t in panel.session.turns])
    open_ = AskPanel(
        {'sure': offer}, [Picture('x', lambda: frame, mm_per_px=0.2)], Session(tmp_path / 't'), fetal_sex=True
    )
    open_._tell_methods = lambda vlm: None
    asked(open_, 4, 'What is it?')
    assert [r['said'][0]['text'] for r in open_.rows] == ['femur length, 31 mm', 'a boy']


@pytest.fixture(scope='module')
def written():
    "A phantom with a name written beside its sector"
    from PIL import ImageDraw
    from fada.phantoms import make_phantom

    im = Image.fromarray(make_phantom('Femur', (99, 1, 0)).image).convert('RGB')
    wide = Image.new('RGB', (im.width + 120, im.height))
    wide.paste(im, (120, 0))
    ImageDraw.Draw(wide).text((4, 4), 'DOE^JANE 1990', fill='white')
    return wide


@pytest.mark.parametrize('allowed', ['yes', 'no'])
def test_a_service_is_asked_after_consent_only(allowed, written, tmp_path, monkeypatch):
    """Nothing leaves before `Send it`; whom it goes to is said; what is written on the picture stays; the setting
    has the last word"""
    sent = []

    def upstream(body):
        sent.append(picture(body))
        return reply(f'femur {BAIT}', 60 if picture(body) else 10)

    d = Door(upstream)
    try:
        (tmp_path / 'settings.ini').write_text(
            f'[model]\nname = ours\n[remote]\nallowed = {allowed}\nrequests_per_minute = 60000\n'
        )
        (tmp_path / 'models.toml').write_text(
            '[ours]\nlike = "openai"\ncheckpoint = "served"\nprompt = "{question}"\n'
            f'[ours.service]\nurl = "{d.url}/v1"\nkey = "OUR_KEY"\n'
        )
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv('OUR_KEY', 'k')
        panel = AskPanel(
            offered_here(s := load_settings()),
            [Picture('x', lambda: written)],
            Session(tmp_path / 's'),
            remote=s.remote,
        )
        said = asked(panel, 6)
        assert d.log == []
        if allowed == 'no':
            if panel.consent.layout.display == '':
                panel.send.click()
                panel.wait()
            assert '[remote] allowed' in panel.state.value and d.log == []
            return
        assert (
            'waiting for your word' in said
            and f':{d.url.rsplit(":", 1)[1]}' in panel.consent.children[0].value
            and panel.consent.layout.display == ''
        )
        panel.keep_back.click()
        panel.wait()
        assert 'not sent' in panel.state.value and d.log == [] and not panel.session.turns
        asked(panel, 6)
        panel.send.click()
        panel.wait()
        assert 'done' in panel.state.value, panel.rows
        before = len(d.log)
        assert 'done' in asked(panel, 3) and len(d.log) == before + 1  # it was agreed to once
        assert panel.consent.layout.display == 'none' and panel.rows[0]['said'][0]['text'] == f'femur {BAIT}'
        shown = np.asarray(Image.open(io.BytesIO(sent[-1])))
        assert not Image.open(io.BytesIO(sent[-1])).info and len(shown)
        assert shown[:30, :100].max() == 0 < np.asarray(written)[:30, :100].max()
    finally:
        d.close()


CELL = '''import os; os.chdir(PROJECT)
from PIL import Image
import numpy as np
from fada.ask import AskPanel, Picture, offered_here
from fada.session import Session
from fada.settings import load_settings
from fada.phantoms import make_phantom
here, there = offered_here(load_settings(model='blip2-nano')), offered_here(load_settings())
frames = [Image.fromarray(make_phantom('Femur', (99, 1, k)).image).convert('RGB') for k in range(4)]
AskPanel({**here, 'once more': here['blip2-nano'], **there}, [Picture('cine', lambda: frames, mm_per_px=.2)], Session('session'), remote=True).widget'''


@pytest.mark.browser
def test_a_cine_two_models_and_a_service_in_jupyterlab(browser, lab, shots, tmp_path):
    """Dark theme, keys: frames, one scrubber for two models, a service that answers in markup after consent; no key
    deletes a cell"""
    from test_app import CONTRAST, notice_stays, said, tab_to

    d = Door(lambda body: reply(f'femur {BAIT}', 60 if picture(body) else 10))
    try:
        (tmp_path / 'settings.ini').write_text(
            '[model]\nname = ours\n[remote]\nallowed = yes\nkeep_text = yes\nrequests_per_minute = 60000\n'
        )
        (tmp_path / 'models.toml').write_text(
            '[ours]\nlike = "openai"\ncheckpoint = "served"\nprompt = "{question}"\n'
            f'[ours.service]\nurl = "{d.url}/v1"\nkey = "OUR_KEY"\n'
        )
        put(
            lab,
            'panel.ipynb',
            "import os; os.environ['OUR_KEY'] = 'k'\n" + CELL.replace('PROJECT', repr(str(tmp_path))),
        )
        theme(lab, 'JupyterLab Dark')
        page = _open(browser, lab, 'panel.ipynb')
        kept = lambda: page.locator('.fada-ask').count() == 1 and page.locator('canvas.picture').count() == 2
        pixels = lambda k: page.locator('canvas.picture').nth(k).evaluate('e => e.toDataURL()')
        settle = lambda: page.wait_for_timeout(300)
        pick = lambda label, value: page.locator(
            f'.widget-dropdown:has(label:text-is("{label}")) select'
        ).select_option(value)
        picture_ = page.locator('canvas.picture').first
        page.wait_for_function("document.querySelector('canvas.picture').dataset.ruler?.endsWith('mm')")
        first = pixels(0)
        picture_.focus()
        page.keyboard.press('PageDown')
        settle()
        second = pixels(0)
        assert second != first
        page.keyboard.press('PageUp')
        settle()
        assert pixels(0) == first
        page.keyboard.press('PageDown')
        page.keyboard.press('PageDown')
        pick('beside it', 'once more')
        said(page, 'blip2-nano beside once more')
        page.fill('input[placeholder^="a question"]', 'What is the fetal orientation?')
        page.keyboard.press('Tab')
        ask = page.locator('button:text-is("Ask")')
        ask.focus()
        page.keyboard.press('d')
        page.keyboard.press('d')
        settle()
        assert kept()
        page.keyboard.press('Enter')
        said(page, 'done', 60)
        assert page.locator('.fada-answers tr').nth(1).locator('td').count() == 4
        bare = pixels(0), pixels(1)
        tab_to(page, '.fada-answers tr')
        page.keyboard.press('Enter')
        page.wait_for_selector('.tokens:visible button >> nth=2', timeout=60_000)
        said(page, 'done')
        settle()
        whole = pixels(0), pixels(1)
        assert whole[0] != bare[0] and whole[1] != bare[1]
        page.locator('.tokens').first.locator('button').nth(1).click()
        settle()
        one = pixels(0), pixels(1)
        assert one[0] != whole[0] and one[1] != whole[1]
        page.keyboard.press('d')
        page.keyboard.press('d')
        assert kept()
        page.screenshot(path=shots / 'panel_dark_1280.png')
        assert page.evaluate(CONTRAST, '.fada-ask') == []
        pick('beside it', 'none')
        pick('model', 'ours')
        said(page, 'ours: ready')
        ask.click()
        page.wait_for_selector(f'.fada-ask b:has-text(":{d.url.rsplit(":", 1)[1]}")')
        assert d.log == []
        page.screenshot(path=shots / 'panel_consent.png')
        page.click('button:has-text("Send it")')
        page.wait_for_selector('.fada-answers b:has-text("femur <img src=x")', timeout=60_000)
        said(page, 'done')
        page.click('text=history of this session')
        page.wait_for_selector('li:has-text("femur <img src=x")')
        assert page.title() != '1' and d.log
        page.set_viewport_size(dict(width=800, height=1000))
        settle()
        page.screenshot(path=shots / 'panel_dark_800.png')
        notice_stays(page, '.jp-WindowedPanel-outer')
        page.close()
        turns = [json.loads(l) for l in (tmp_path / 'session' / 'turns.jsonl').read_text().splitlines()]
        assert [(t['frame'], t['model']['name']) for t in turns] == [
            (2, 'blip2-nano'),
            (2, 'blip2-nano'),
            (2, 'ours'),
        ]
    finally:
        theme(lab, 'JupyterLab Light')
        d.close()


def put(lab, name, source):
    "Give Lab a notebook of one cell"
    cell = dict(cell_type='code', id='one', metadata={}, outputs=[], execution_count=None, source=source)
    book = dict(
        cells=[cell],
        metadata=dict(kernelspec=dict(name='python3', display_name='Python 3', language='python')),
        nbformat=4,
        nbformat_minor=5,
    )
    _send(f'{lab}/api/contents/app/{name}', dict(type='notebook', format='json', content=book))


def theme(lab, name):
    _send(f'{lab}/lab/api/settings/@jupyterlab/apputils-extension:themes', dict(raw=json.dumps(dict(theme=name))))


def _send(url, body):
    from urllib.request import Request, urlopen

    urlopen(Request(url + '?token=t0ken', json.dumps(body).encode(), method='PUT'), timeout=20)


def test_the_adapter_that_an_image_proposed_is_asked_again(tmp_path):
    "A session with adapters by image says of each answer which adapter gave it"
    from types import SimpleNamespace as Of
    from fada.ask import again_of
    from fada.serve import Offer

    s = load_settings(model='blip2-nano', device='cpu', precision='fp32')
    again = again_of(Offer('blip2-nano', '', 'w', (('Femur', 'f'), ('Abdomen', 'a'))), s)
    given = dict(name='blip2-nano', weights='w', precision='fp32', device='cpu')
    for name, folder in (('Femur', 'f'), ('Abdomen+Thorax', 'a'), ('base', None)):
        assert again(Of(route=Of(adapter=name))) == given | dict(adapter=folder)
    assert again_of(Offer('blip2-nano', 'f', 'w'), s) == given | dict(adapter='f')


LONG = 300  # frames of a cine


def counted(frames=LONG, side=96):
    "Frames that say their own number: nine upright bars, the lowest bit on the left"
    out = np.full((frames, side, side), 20, np.uint8)
    for k in range(frames):
        for b in range(9):
            out[k, 20:70, 6 + 9 * b : 12 + 9 * b] = 240 if k >> b & 1 else 20
    return out


def number_of(pixels):
    "The number that a frame says; pixels: rows × columns"
    h, w = pixels.shape
    return sum((pixels[int(h * 45 / 96), int(w * (9 + 9 * b) / 96)] > 130) << b for b in range(9))


SLOW = '''import os; os.chdir(PROJECT)
import time
from fada.ask import AskPanel, Offered, sample_images
from fada.session import Session
from fada.vlm import load
class Slow:
    "Another model's steps, a quarter of a second each"
    def __init__(self, steps): self.steps = steps
    def step(self): time.sleep(.25); return self.steps.step()
    def __getattr__(self, name): return getattr(self.steps, name)
def nano(): return load('blip2-nano', device='cpu', precision='fp32')
def slow():
    m = nano(); begin = m.begin; m.begin = lambda *a: Slow(begin(*a))
    m.core.vision_model.register_forward_hook(lambda *_: time.sleep(.4)); return m
AskPanel({'slow': Offered(slow), 'quick': Offered(nano)}, sample_images('none'), Session('session')).widget'''


@pytest.mark.browser
def test_a_correction_outlives_redraws_and_a_map_is_stopped_in_jupyterlab(browser, lab, shots, tmp_path):
    """While a second model streams an open field keeps its text, its caret and the focus; Stop ends a map; the
    state says so"""
    from test_app import said

    put(lab, 'slow.ipynb', SLOW.replace('PROJECT', repr(str(tmp_path))))
    page = _open(browser, lab, 'slow.ipynb')
    pick = lambda label, value: page.locator(f'.widget-dropdown:has(label:text-is("{label}")) select').select_option(
        value
    )
    pick('model', 'quick')
    said(page, 'quick: ready')
    pick('beside it', 'slow')
    said(page, 'quick beside slow')
    page.fill('input[placeholder^="your name"]', 'Ada')
    page.keyboard.press('Tab')
    page.click('button:has-text("All eight questions")')
    row = page.locator('.fada-answers tr').nth(1)
    row.locator('td:nth-child(2) button[title^="edit"]').click(timeout=60_000)
    page.keyboard.type('spine, ribs')
    page.keyboard.press('ArrowLeft')
    page.keyboard.press('ArrowLeft')
    look = "() => { const f = document.activeElement; return [f.tagName, f.value, f.selectionStart, [...document.querySelectorAll('.fada-answers td:nth-child(3) b')].map(b => b.textContent).join('|')]; }"
    first = page.evaluate(look)
    assert first[:3] == ['INPUT', 'spine, ribs', 9]
    grown = set()
    for _ in range(12):
        page.wait_for_timeout(150)
        now = page.evaluate(look)
        assert now[:3] == first[:3], now
        grown.add(now[3])
    assert len(grown) > 3, grown  # the other column was drawn again and again meanwhile
    page.keyboard.type('and ')
    page.screenshot(path=shots / 'panel_edit_open.png')
    page.keyboard.press('Enter')
    page.wait_for_selector('.fada-answers td:nth-child(2) small:has-text("changed to “spine, riand bs”")')
    said(page, 'done', 60)
    assert (
        page.locator('.fada-answers small:has-text("changed to")').count() == 1
        and page.locator('.fada-answers input').count() == 0
    )
    pick('beside it', 'none')
    pick('model', 'slow')
    said(page, 'slow: ready')
    page.fill('input[placeholder^="a question"]', 'How is the image quality?')
    page.keyboard.press('Tab')
    page.click('button:text-is("Ask")')
    said(page, 'done', 60)
    pick('map by', 'integrated gradients')
    page.locator('.fada-answers button:text-is("where?")').click()
    said(page, 'drawing the map')
    page.wait_for_timeout(1000)
    start = time.perf_counter()
    page.click('button:text-is("Stop")')
    said(page, 'stopped before the map was drawn', 20)
    took = time.perf_counter() - start
    assert took < 2 and page.locator('.fada-viewer .tokens:visible').count() == 0, took
    pick('map by', 'relevancy')
    page.locator('.fada-answers button:text-is("where?")').click()
    page.wait_for_selector('.fada-viewer .tokens button', timeout=60_000)
    page.close()
    (judged,) = [json.loads(l) for l in (tmp_path / 'session' / 'corrections.jsonl').read_text().splitlines()]
    assert (judged['kind'], judged['final'], judged['who']) == ('edit', 'spine, riand bs', 'Ada')


def test_a_long_cine_keeps_the_numbers_of_its_file(nano, tmp_path):
    """Of 300 frames each third is there; which was asked is said and kept by its number in the file, and so are its
    pixels"""
    path = write_dicom(tmp_path / 'long.dcm', counted())
    p = uploaded(path.name, path.read_bytes())
    assert (len(p.get()), p.step, p.total) == (100, 3, LONG)
    assert [number_of(np.asarray(f.convert('L'))) for f in p.get()] == list(range(0, LONG, 3))
    panel = AskPanel(nano, [p], Session(tmp_path / 'session'))
    assert (panel.views[0].every, panel.views[0].total) == (3, LONG)
    panel.views[0].frame = 50
    assert 'done' in asked(panel, 6)
    (t,) = panel.session.turns
    assert (
        t.frame == 150
        and 'frame 151 of 300' in panel.rows[0]['said'][0]['note']
        and ', frame 151' in panel.history.value
    )
    kept = Image.open(tmp_path / 'session' / 'images' / f'{t.pixels_sha256[:16]}.png')
    assert number_of(np.asarray(kept.convert('L'))) == 150
    for n, step in ((119, 1), (120, 1), (121, 2)):
        q = uploaded('x.dcm', write_dicom(tmp_path / 'x.dcm', counted(n)).read_bytes())
        assert (q.step, q.total) == (step, n)


@pytest.mark.browser
def test_a_long_cine_in_jupyterlab(browser, lab, shots, tmp_path):
    """Of 300 frames the number in sight is that of the file; what was asked at once after a key is what stood on
    the canvas"""
    import base64
    from test_app import said, upload

    put(
        lab,
        'long.ipynb',
        SLOW.replace('PROJECT', repr(str(tmp_path))).replace("{'slow': Offered(slow), 'quick'", "{'quick'"),
    )
    page = _open(browser, lab, 'long.ipynb')
    upload(page, write_dicom(tmp_path / 'long.dcm', counted()))
    said(page, 'unlike the training images')
    canvas = page.locator('canvas.picture').first
    text = page.locator('.fada-viewer .number').first
    page.wait_for_function(
        "document.querySelector('.fada-viewer .told').innerText.includes('one frame in 3 of the file')"
    )

    def seen():
        page.wait_for_timeout(150)
        png = canvas.evaluate("e => e.toDataURL('image/png')").split(',')[1]
        return number_of(np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert('L')))

    shown = lambda: int(text.inner_text().split(' of ')[0]) - 1
    assert text.inner_text() == '1 of 300' and seen() == 0
    canvas.focus()
    for key, times, frame in (('PageDown', 50, 150), ('PageDown', 49, 297), ('PageUp', 3, 288)):
        for _ in range(times):
            page.keyboard.press(key)
        assert (seen(), shown()) == (frame, frame)
    page.screenshot(path=shots / 'panel_long_cine.png')
    page.fill('input[placeholder^="a question"]', 'How is the image quality?')
    page.keyboard.press('Tab')
    canvas.focus()
    page.keyboard.press('PageUp')
    page.click('button:text-is("Ask")')
    said(page, 'done', 60)
    page.wait_for_selector('.fada-answers small:has-text("frame 286 of 300")')
    assert seen() == shown() == 285
    page.click('button[aria-label="play"]')
    page.wait_for_timeout(900)
    page.click('button:text-is("Ask")')
    page.wait_for_selector('.fada-answers small:has-text("frame")')
    said(page, 'done', 60)
    stood = seen()
    assert shown() == stood != 285
    page.wait_for_selector(f'.fada-answers small:has-text("frame {stood + 1} of 300")')
    page.close()
    turns = [json.loads(l) for l in (tmp_path / 'session' / 'turns.jsonl').read_text().splitlines()]
    assert [t['frame'] for t in turns] == [285, stood]
    for t in turns:
        assert (
            number_of(
                np.asarray(
                    Image.open(tmp_path / 'session' / 'images' / f'{t["pixels_sha256"][:16]}.png').convert('L')
                )
            )
            == t['frame']
        )


def test_an_upload_comes_into_view_or_is_said(nano, settings, tmp_path):
    "What cannot be read is a sentence, and the image in view stays; no upload changes nothing"
    path = write_dicom(tmp_path / 'a.dcm', cine())
    panel = AskPanel(nano, [uploaded(path.name, path.read_bytes())], Session(tmp_path / 's'))
    seen = panel.picture
    buffer = io.BytesIO()
    Image.new('L', (40, 30), 90).save(buffer, 'PNG')
    before = panel.state.value
    from datetime import datetime, timezone

    now = datetime.now(timezone.utc)
    panel.open_upload()
    assert panel.picture is seen and panel.state.value == before
    panel.upload.value = (dict(name='bad.png', type='image/png', size=3, content=b'bad', last_modified=now),)
    assert panel.picture is seen and 'bad.png' in panel.state.value
    panel.upload.value = (
        dict(name='own.png', type='image/png', size=3, content=buffer.getvalue(), last_modified=now),
    )
    assert (
        panel.picture is not seen
        and panel.image.size == (40, 30)
        and 'unlike the training images' in panel.state.value
    )
