"""The viewer in JupyterLab in a real Chromium: what is seen on the canvas, what the kernel hears, and what keys
must not do."""

import io, json, re
import numpy as np
import pytest
from PIL import Image
from test_browser import _open, browser, lab, shots  # noqa: F401  fixtures

pytestmark = pytest.mark.browser
MARKUP = '<img src=x onerror="document.title=1">'
CELL = '''
import json
import numpy as np
from fada.maps import Map
from fada.viewer import Viewer
y, x = np.mgrid[:480, :640]
frames = [(40+100*((x-100-30*k)**2+(y-240)**2 < 60**2)+20*((x//40+y//40) % 2)).astype(np.uint8) for k in range(12)]
heat = np.zeros((4, 8, 8), np.float32); heat[range(4), [1, 3, 5, 6], [1, 3, 5, 7]] = [.2, .5, 1, .1]; heat[:, 0] = np.nan
the_map = Map(None, heat.mean(0), (0., 0., 640., 480.), 'by hand', 'share of attention', 'q', 'a', 'none', ['the', ' femur', MARKUP, '.'], heat,
              note=MARKUP, badge='not verified '+MARKUP)
viewer = Viewer(width=600); viewer.show(frames, .2, 'a disc that moves '+MARKUP, fps=20); viewer.overlay(the_map)
def hear(change):
    with open(heard, 'a') as f: f.write(json.dumps([change.name, change.new])+chr(10))
viewer.observe(hear, ['frame', 'token', 'opacity', 'window', 'level', 'zoom', 'pan'])
display(viewer)
import ipywidgets
step = ipywidgets.Text(description='step'); display(step)
def go(change):
    if change.new == 'pixels': viewer.show(frames[0])
    if change.new == 'large': viewer.show(np.zeros((100, 4000), np.uint8), .1, 'a wide one')
    if change.new == 'broken': viewer.frames = [b'no picture']
    if change.new == 'again': viewer.opacity = .45; viewer.show(frames, .2, 'a disc that moves '+MARKUP, fps=20); viewer.overlay(the_map)
step.observe(go, 'value')
'''
CANVAS = "document.querySelector('canvas.picture')"
# milliseconds from an event to the frame in which the canvas is another
TIMED = f"""([selector, value]) => new Promise(done => {{
  const canvas = {CANVAS}, e = document.querySelector(selector), was = canvas.dataset.drawn, began = performance.now();
  if (value === null) e.click(); else {{ e.value = value; e.dispatchEvent(new Event('input', {{bubbles: true}})); }}
  const look = () => canvas.dataset.drawn !== was ? done([performance.now()-began, +canvas.dataset.ms]) : requestAnimationFrame(look); look(); }})"""


def put(lab, name, source):
    "Send one cell to Lab as a notebook"
    import urllib.request

    book = dict(
        nbformat=4,
        nbformat_minor=5,
        metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')),
        cells=[dict(cell_type='code', id='one', metadata={}, outputs=[], execution_count=None, source=source)],
    )
    body = json.dumps(dict(type='notebook', format='json', content=book)).encode()
    urllib.request.urlopen(urllib.request.Request(f'{lab}/api/contents/app/{name}?token=t0ken', body, method='PUT'))


def drawn(page):
    "The canvas's pixels, rows × columns × RGB, once nothing changes any more"
    page.wait_for_timeout(120)
    page.evaluate('() => new Promise(requestAnimationFrame)')
    import base64

    png = page.evaluate(f"() => {CANVAS}.toDataURL('image/png')").split(',')[1]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert('RGB')).astype(int)


def tell(page, word):
    "Have the kernel do something with the viewer"
    box = page.locator('.widget-text:has(label:text-is("step")) input')
    box.fill(word)
    page.keyboard.press('Tab')


def status(page):
    return page.locator('.fada-viewer .told').inner_text()


def says(page, words):
    page.wait_for_selector(f'.fada-viewer .told:has-text("{words}")', timeout=10_000)


def rules(page, words):
    page.wait_for_function(f'w => {CANVAS}.dataset.ruler === w', arg=words, timeout=10_000)


class Heard:
    "The last value of each trait as the kernel heard it"

    def __init__(self, path):
        self.path = path
        path.touch()

    def __call__(self, page, name, wanted, seconds=10):
        for _ in range(seconds * 10):
            got = dict(json.loads(l) for l in self.path.read_text().splitlines()).get(name)
            if got is not None and (wanted(got) if callable(wanted) else got == wanted):
                return got
            page.wait_for_timeout(100)
        raise AssertionError(f'{name}: {got!r} was heard last')


@pytest.fixture(scope='module')
def opened(browser, lab, tmp_path_factory):
    heard = Heard(tmp_path_factory.mktemp('viewer') / 'heard')
    put(lab, 'viewer.ipynb', f'heard, MARKUP = {str(heard.path)!r}, {MARKUP!r}\n{CELL}')
    page = _open(browser, lab, 'viewer.ipynb', 'canvas.picture[data-drawn]')
    page.wait_for_selector('.fada-viewer .empty', state='hidden')
    page.set_viewport_size(dict(width=1280, height=1400))
    yield page, heard
    page.close()


@pytest.fixture
def page(opened):
    "The viewer as it was first shown"
    p = opened[0]
    p.wait_for_timeout(250)
    tell(p, '')
    tell(p, 'again')  # the last test's choices have been told by now
    p.wait_for_function("() => document.querySelectorAll('.fada-viewer .tokens button').length === 5")
    p.wait_for_selector('.fada-viewer .told:has-text("frame 1 of 12")')
    drawn(p)
    return p


@pytest.fixture
def heard(opened):
    return opened[1]


def test_tokens_and_opacity_without_the_kernel(page, heard, shots):
    """A click lays another map over the picture where it belongs, a slider fades it, within 50 ms; the kernel hears
    of it afterwards"""
    whole = drawn(page)
    h, w = whole.shape[:2]
    assert (w, h) == (600, 450)
    page.locator('.fada-viewer .tokens button').nth(3).click()
    third = drawn(page)
    heard(page, 'token', 2)
    assert (
        ' '.join(page.locator('.fada-viewer .scale').inner_text().split())
        == f'map 0 1 share of attention this token at most 1 not verified {MARKUP}'
    )
    change = np.abs(third - whole).sum(2)
    at = np.unravel_index((third[..., 1] - third[..., 2]).argmax(), (h, w))  # yellow, not the white of the ruler
    assert (
        change.max() > 60 and abs(at[0] - 5.5 / 8 * h) < h / 16 and abs(at[1] - 5.5 / 8 * w) < w / 16
    )  # its bright cell is the sixth of the sixth row
    assert (
        np.ptp(third[: h // 18], axis=2).max() == 0 and np.ptp(third[h // 4 :], axis=2).max() > 30
    )  # NaN is not drawn: the first row stays grey
    took = [page.evaluate(TIMED, ['.fada-viewer input[aria-label^=opacity]', str(v)]) for v in (0.1, 0.5, 0.9)]
    took += [page.evaluate(TIMED, [f'.fada-viewer .tokens button:nth-child({k})', None]) for k in (1, 2, 4)]
    print('milliseconds to another picture, of these for drawing:', took)
    assert sorted(t for t, _ in took)[3] < 50 and max(ms for _, ms in took) < 50
    strong = drawn(page)
    assert np.abs(strong - third).max() > 60
    heard(page, 'opacity', 0.9)
    page.locator('.fada-viewer input[aria-label^=opacity]').fill('0')
    bare = drawn(page)
    assert np.ptp(bare, axis=2).max() == 0 and bare[: h * 4 // 5].max() == 160
    page.screenshot(path=shots / 'viewer_bare.png')


def test_words_from_outside_stay_words(page):
    "Markup in a token, badge, note or description is shown or spoken, never made"
    assert (
        page.locator('.fada-viewer .tokens button').nth(3).inner_text() == MARKUP
        and MARKUP in page.locator('.fada-viewer .badge').inner_text()
    )
    assert page.locator('.fada-viewer .note').inner_text() == f'by hand: attention is not evidence. {MARKUP}'
    assert (
        page.locator('.fada-viewer img').count() == 0
        and page.title() != '1'
        and 'a disc that moves' in page.locator('canvas.picture').get_attribute('aria-label')
    )


def test_zoom_pan_window_and_reset(page, heard):
    "By wheel, drag, right drag and buttons; back to the first picture with one key"
    page.keyboard.press('Escape')
    first = drawn(page)
    canvas = page.locator('canvas.picture')
    box = canvas.bounding_box()
    x, y = box['x'] + box['width'] / 2, box['y'] + box['height'] / 2
    page.mouse.move(x, y)
    page.mouse.wheel(0, -240)
    page.wait_for_timeout(200)
    assert 'zoom 1×' in status(page)  # not clicked yet: the page scrolls, the picture stays
    canvas.scroll_into_view_if_needed()
    canvas.click()
    box = canvas.bounding_box()
    x, y = box['x'] + box['width'] / 2, box['y'] + box['height'] / 2
    page.mouse.move(x, y)
    page.mouse.wheel(0, -200)
    near = drawn(page)
    assert np.abs(near - first).max() > 30
    zoom = heard(page, 'zoom', lambda z: z > 1.5)
    assert f'zoom {zoom:.3g}' in status(page)
    page.mouse.down()
    page.mouse.move(x + 80, y + 40, steps=4)
    page.mouse.up()
    moved = drawn(page)
    assert (
        np.abs(moved[40:, 80:][:380, :500] - near[:-40, :-80][:380, :500]).mean() < 4 < np.abs(moved - near).mean()
    )  # the same picture, 80 to the right, 40 down
    heard(page, 'pan', lambda p: p[0] < 0 and p[1] < 0)
    page.mouse.down(button='right')
    page.mouse.move(x - 60, y - 60, steps=4)
    page.mouse.up(button='right')
    heard(page, 'window', lambda v: v < 255)
    heard(page, 'level', lambda v: v < 127.5)
    assert np.abs(drawn(page) - moved).max() > 20
    assert page.locator('.lm-Menu').count() == 0  # the right button is the viewer's
    page.keyboard.press('0')
    assert np.abs(drawn(page) - first).max() == 0
    page.locator('.fada-viewer input[aria-label=window]').fill('64')
    page.locator('.fada-viewer input[aria-label=level]').fill('50')
    page.locator('.fada-viewer input[aria-label^=opacity]').fill('0')
    grey = drawn(page)[..., 0]
    assert grey[19, 19] == 88 and grey[19, 56] == 167  # 40 and 60 of a window from 18 to 82


def test_cine(page, heard):
    "Frames by key, slider and play, round at the end; the kernel hears where it stopped, not every frame"
    first = drawn(page)
    page.locator('canvas.picture').click()
    page.keyboard.press('PageDown')
    heard(page, 'frame', 1)
    assert np.abs(drawn(page) - first).max() > 50
    badge = page.locator('.fada-viewer .badge').first
    assert badge.is_hidden()  # the map is of frame 0 alone
    page.keyboard.press('PageUp')
    heard(page, 'frame', 0)
    assert badge.is_visible() and np.abs(drawn(page) - first).max() == 0
    page.keyboard.press('PageUp')
    heard(page, 'frame', 11)
    assert 'frame 12 of 12' in status(page)
    page.locator('.fada-viewer input[aria-label=frame]').fill('4')
    heard(page, 'frame', 4)
    lines = len(heard.path.read_text().splitlines())
    seen = page.evaluate("""() => new Promise(done => { const seen = new Set(), text = document.querySelector('.fada-viewer .bar .number'); const began = performance.now();
      document.querySelector('.fada-viewer button[aria-label=play]').click();
      const look = () => { seen.add(text.textContent); performance.now()-began < 1500 ? requestAnimationFrame(look) : done([...seen]); }; look(); })""")
    assert len(seen) >= 8, seen
    during = len(heard.path.read_text().splitlines()) - lines
    page.locator('.fada-viewer button[aria-label=pause]').click()
    drawn(page)
    k = int(page.locator('.fada-viewer .bar .number').first.inner_text().split()[0]) - 1
    heard(page, 'frame', k)
    assert during == 0
    page.locator('.fada-viewer button[aria-label=play]').click()
    page.wait_for_timeout(400)
    page.mouse.click(4, 4)  # elsewhere: it stops, and the kernel hears where
    page.wait_for_selector('.fada-viewer button[aria-label=play]')
    now = int(page.locator('.fada-viewer .bar .number').first.inner_text().split()[0]) - 1
    assert now != k
    heard(page, 'frame', now)


def test_ruler_and_line_in_mm_and_pixels(page, shots):
    """A round length of the right size on the screen; a line along the disc's diameter, by mouse and by keys;
    pixels where no scale is known"""
    rules(page, '20 mm')  # 100 pixels of the frame, 94 of the screen
    page.locator('.fada-viewer input[aria-label^=opacity]').fill('0')
    canvas = page.locator('canvas.picture')
    white = (drawn(page)[435:440, 8:200].min(2) > 230).any(0)
    assert 90 <= np.flatnonzero(white).max() - np.flatnonzero(white).min() <= 99
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    at = lambda px, py: (box['x'] + px * 600 / 640, box['y'] + py * 600 / 640)
    page.mouse.move(*at(40, 240))
    page.keyboard.down('Shift')
    page.mouse.down()
    page.mouse.move(*at(160, 240), steps=3)
    page.mouse.up()
    page.keyboard.up('Shift')
    says(page, 'measured')
    said = float(re.search(r'measured ([\d.]+) mm', status(page))[1])
    assert abs(said - 24) < 0.5  # 120 pixels of 0.2 mm
    page.screenshot(path=shots / 'viewer_measured.png')
    page.keyboard.press('0')
    drawn(page)
    assert 'measured' not in status(page)
    page.keyboard.press('m')
    says(page, 'measured 32.0 mm')  # a quarter of 640
    for _ in range(3):
        page.keyboard.press('Shift+ArrowRight')
    says(page, 'measured 32.6 mm')
    page.keyboard.press('+')
    page.keyboard.press('+')
    says(page, 'measured 32.6 mm')
    rules(page, '20 mm')
    for _ in range(5):
        page.keyboard.press('+')
    rules(page, '5 mm')
    tell(page, 'pixels')
    page.wait_for_selector('.fada-viewer .tokens', state='hidden')
    rules(page, '100 px (no scale)')
    canvas.click()
    page.keyboard.press('m')
    says(page, 'measured 160 px')
    assert (
        not page.locator('.fada-viewer button[aria-label=play]').is_visible()
        and not page.locator('.fada-viewer .scale').is_visible()
    )


def test_keys_alone(page, heard, shots):
    """Everything can be reached and done by keys, focus is seen, and Lab hears none of it: d d deletes no cell, b
    adds none"""
    cells = page.locator('.jp-Cell').count()
    canvas = page.locator('canvas.picture')
    canvas.focus()
    for key in ('d', 'd', 'b', 'a', 'x', 'Enter', 'z', 'Control+Enter', 'Shift+Enter'):
        page.keyboard.press(key)
    assert page.locator('.jp-Cell').count() == cells and page.evaluate(f'() => document.activeElement === {CANVAS}')
    page.keyboard.press(']')
    heard(page, 'opacity', lambda o: o > 0.45)
    page.keyboard.press('.')
    heard(page, 'token', 0)
    page.keyboard.press('W')
    page.keyboard.press('w')
    page.keyboard.press('w')
    heard(page, 'window', 247)
    page.keyboard.press('L')
    heard(page, 'level', 131.5)
    page.keyboard.press('+')
    page.keyboard.press('ArrowRight')
    heard(page, 'pan', lambda p: p[0] > 0)
    reached = []
    for _ in range(16):
        page.keyboard.press('Tab')
        reached.append(page.evaluate('() => document.activeElement.ariaLabel || document.activeElement.tagName'))
        if 'SUMMARY' in reached:
            break
        seen = page.evaluate(
            "() => { const s = getComputedStyle(document.activeElement); return s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 2; }"
        )
        assert seen, reached
        page.keyboard.press('d')
        page.keyboard.press('d')
    assert reached == [
        'frame before',
        'play',
        'next frame',
        'frame',
        'token 1: the',
        'opacity of the map',
        'further',
        'closer',
        'whole picture, original grey levels',
        'window',
        'level',
        'SUMMARY',
    ]
    assert page.locator('.jp-Cell').count() == cells
    page.locator('.fada-viewer .tokens button[tabindex="0"]').focus()
    page.keyboard.press('ArrowRight')
    heard(page, 'token', 1)
    assert page.evaluate('() => document.activeElement.ariaLabel') == 'token 2: femur'
    page.keyboard.press('End')
    heard(page, 'token', 3)
    page.keyboard.press('ArrowRight')
    heard(page, 'token', -1)
    page.screenshot(path=shots / 'viewer_keys.png')


CONTRAST = """() => { // the lowest contrast of text and its ground, WCAG 2.2
  const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= .04045 ? v/12.92 : ((v+.055)/1.055)**2.4); return .2126*r+.7152*g+.0722*b; };
  const parse = s => s.match(/[\\d.]+/g).map(Number), ground = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] === 1) return c; } return [255, 255, 255]; };
  const found = [...document.querySelectorAll('.fada-viewer *')].filter(e => e.offsetParent && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())).map(e => {
    const b = ground(e), f = parse(getComputedStyle(e).color), a = f[3] ?? 1, mixed = [0, 1, 2].map(i => f[i]*a+b[i]*(1-a)), [x, y] = [light(mixed), light(b)].sort((p, q) => q-p); return [(x+.05)/(y+.05), e.textContent]; });
  return found.sort((p, q) => p[0]-q[0])[0].concat(found.length); }"""


def test_themes_and_widths(page, shots):
    "Light and dark, 1280 and 800 pixels wide: text at 4.5 to 1 or better, nothing sticks out"
    for theme in ('JupyterLab Dark', 'JupyterLab Light'):
        page.locator('.lm-MenuBar-item:has-text("Settings")').click()
        page.locator('.lm-Menu-item:has-text("Theme")').first.hover()
        page.locator(f'.lm-Menu-item:has-text("{theme}")').filter(has_not_text='Contrast').first.click()
        page.wait_for_selector(f'body[data-jp-theme-light={str("Light" in theme).lower()}]', state='attached')
        page.wait_for_timeout(300)
        for width in (1280, 800):
            page.set_viewport_size(dict(width=width, height=1400))
            drawn(page)
            lowest, text, n = page.evaluate(CONTRAST)
            assert lowest >= 4.5 and n > 15, (theme, text, lowest)
            out = page.evaluate(
                "() => { const o = document.querySelector('.jp-OutputArea-output:has(.fada-viewer)').getBoundingClientRect(); return [...document.querySelectorAll('.fada-viewer *')].filter(e => e.offsetParent && e.getBoundingClientRect().right > o.right+1).length; }"
            )
            assert out == 0
            page.screenshot(path=shots / f'viewer_{theme.split()[1].lower()}_{width}.png')
    page.set_viewport_size(dict(width=1280, height=1400))


def test_large_and_broken_pictures(page):
    "What was sent smaller says so and keeps its millimetres; what is no picture is said"
    tell(page, 'large')
    page.wait_for_selector('.fada-viewer .told:has-text("sent at 51 % of its size")')
    rules(page, '100 mm') and page.locator('canvas.picture').get_attribute('aria-label') == 'a wide one'
    tell(page, 'broken')
    page.wait_for_selector('.fada-viewer .empty:has-text("This picture cannot be read")')
