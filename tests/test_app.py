"`fada app` as a visitor meets it: the page in a real Chromium, the model in a process of its own."

import http.client, json, os, signal, subprocess, time, zipfile
import psutil
import pytest
from commands import typed
from test_browser import browser, shots  # noqa: F401  fixtures
from test_panel import SECRETS, cine, write_dicom
from test_serve import free_port

pytestmark = pytest.mark.browser
TOKEN = 'page-token-0'


@pytest.fixture(scope='module')
def site(tmp_path_factory, root):
    "A page and its model; (url, process, log)"
    port = free_port()
    d = tmp_path_factory.mktemp('app')
    log = open(d / 'log', 'w')
    (d / 'settings.ini').write_text(f'[output]\nfolder = {d}/outputs\n[data]\nfolder = {d}/none\n')
    (d / 'nbs').symlink_to(root / 'nbs')
    p = subprocess.Popen(
        typed('app --no-browser --port {port} --idle 20', port=port),
        cwd=d,
        stdout=log,
        stderr=log,
        env=dict(os.environ, FADA_TOKEN=TOKEN, FADA_THREADS='1', OPENAI_API_KEY='sk-not-for-pages'),
        start_new_session=True,
    )
    for _ in range(900):
        if 'The page:' in (d / 'log').read_text():
            break
        assert p.poll() is None, (d / 'log').read_text()
        time.sleep(0.1)
    yield port, p, d / 'log'
    children = psutil.Process(p.pid).children(recursive=True)
    p.send_signal(signal.SIGINT)
    assert p.wait(60) == 0
    gone, alive = psutil.wait_procs(children, timeout=15)
    assert not alive  # worker, page and kernels are gone
    assert 'Traceback' not in (d / 'log').read_text()


def get(port, path, **headers):
    c = http.client.HTTPConnection('127.0.0.1', port, timeout=30)
    c.putrequest('GET', path, skip_host='Host' in headers)
    for k, v in headers.items():
        c.putheader(k, v)
    c.endheaders()
    r = c.getresponse()
    to = r.getheader('Location', '')
    return (
        get(port, to + f'?token={TOKEN}') if 'voila/files' in to else (r.status, r.read())
    )  # what lies beside the notebook is asked for there


def opened(browser, port, width=1280, **kw):
    page = browser.new_page(viewport=dict(width=width, height=1000), **kw)
    asked = []
    page.on('request', lambda r: asked.append(r.url))
    page.goto(f'http://127.0.0.1:{port}/?token={TOKEN}')
    page.wait_for_selector('button:has-text("All eight questions")', timeout=120_000)
    return page, asked


def test_the_door_of_the_page(site):
    """Without token: nothing of the notebook; another host, files beside it, paths out of it: refused; no source,
    no key in a kernel"""
    port = site[0]
    status, text = get(port, '/')
    assert status in (302, 401, 403) and b'panel' not in text
    for path in ('/?token=wrong', '/voila/render/page.ipynb'):
        assert get(port, path)[0] in (302, 401, 403), path
    assert get(port, f'/?token={TOKEN}', Host='evil.example')[0] == 403
    for path in (
        '/voila/files/page.ipynb',
        '/voila/files/voila.json',
        '/voila/static/../../../etc/passwd',
        '/files/page.ipynb',
        '/api/contents',
    ):
        assert get(port, f'{path}?token={TOKEN}')[0] in (403, 404), path


CONTRAST = """(root) => { const low = []; const rgb = c => (c.match(/[\\d.]+/g) || []).map(Number);
 const light = ([r, g, b]) => [r, g, b].map(v => (v /= 255) <= .03928 ? v/12.92 : ((v+.055)/1.055)**2.4).reduce((s, v, i) => s+v*[.2126, .7152, .0722][i], 0);
 const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor); if (c.length === 3 || c[3] === 1) return c; } return [255, 255, 255]; };
 for (const e of document.querySelectorAll(root+' *')) {
  if (e.closest('[disabled], [hidden], select') || !e.getClientRects().length || ![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
  const [x, y] = [light(rgb(getComputedStyle(e).color)), light(behind(e))].sort((p, q) => q-p), ratio = (x+.05)/(y+.05);
  if (ratio < 4.5) low.push(`${e.tagName} ${e.className} ${e.textContent.slice(0, 30)}: ${ratio.toFixed(2)}`); }
 return low; }"""  # text of less than 4.5 to 1, as WCAG AA asks

BAIT = '<img src=x onerror="document.title=1">'


def notice_stays(page, scroller):
    "With the end of the panel in sight the whole notice is in sight too, and nothing lies over it"
    size = page.viewport_size
    page.set_viewport_size(dict(size, height=500))
    page.wait_for_timeout(300)
    far = page.locator(scroller).evaluate(
        "e => { const end = x => x.getBoundingClientRect().bottom; e.scrollTop += end(document.querySelector('.fada-ask'))-end(e); return e.scrollTop; }"
    )
    page.wait_for_timeout(300)
    assert far > 100
    seen = page.locator('.fada-notice').evaluate("""e => { const b = e.getBoundingClientRect(); return [b.top, b.bottom, innerHeight,
      [.02, .5, .98].every(x => e.contains(document.elementFromPoint(b.left+x*b.width, (b.top+b.bottom)/2)))]; }""")
    assert (
        -1 <= seen[0] < seen[1] <= seen[2]
        and seen[3]
        and 'Not a medical device' in page.locator('.fada-notice').inner_text()
    ), seen
    page.locator(scroller).evaluate('e => { e.scrollTop = 0; }')
    page.set_viewport_size(size)


def said(page, text, seconds=60):
    "Wait until the panel says so; else tell what it says"
    from playwright.sync_api import TimeoutError

    try:
        page.wait_for_selector(f'.fada-ask .widget-html i:has-text("{text}")', timeout=1000 * seconds)
    except TimeoutError:
        raise AssertionError(
            f'{text!r} is not said, but {page.locator(".fada-ask .widget-html").all_inner_texts()}'
        ) from None


def upload(page, path):
    with page.expect_file_chooser() as c:
        page.click('button:has-text("or open")')
    c.value.set_files(path)


def tab_to(page, css, key='Tab', most=80):
    "Go to an element as one does without a mouse"
    for _ in range(most):
        page.keyboard.press(key)
        if page.evaluate('css => document.activeElement.matches(css)', css):
            return
    raise AssertionError(f'{css} is not reached by {key}')


def test_ask_on_the_page(browser, site, shots, tmp_path):
    """All eight, words of one's own, a DICOM cine with a patient in its tags, broken and huge files, export;
    nothing from another host, no source"""
    page, asked = opened(browser, site[0])
    page.click('button:has-text("All eight questions")')
    said(page, 'done')
    assert page.locator('.fada-answers tr').count() == 9
    page.screenshot(path=shots / 'page_1280.png')
    page.fill('input[placeholder^="a question"]', f'{BAIT} ?')
    page.keyboard.press('Tab')
    page.click('button:text-is("Ask")')
    page.wait_for_selector('td:has-text("<img src=x")', timeout=60_000)
    assert 'from fada' not in page.content() and page.locator('text=Not a medical device').first.is_visible()
    upload(page, write_dicom(tmp_path / 'Doe_Jane_19900101.dcm', cine()))
    said(page, 'unlike the training images')
    picture = page.locator('canvas.picture').first
    page.wait_for_function("document.querySelector('canvas.picture').dataset.ruler.endsWith('mm')")
    page.wait_for_timeout(1000)
    picture.focus()
    page.keyboard.press('PageDown')
    page.keyboard.press('PageDown')
    page.wait_for_timeout(500)  # frames are decoded, the last one is told
    page.fill('input[placeholder^="a question"]', 'How is the image quality?')
    page.keyboard.press('Tab')
    page.click('button:text-is("Ask")')
    said(page, 'done')
    page.click('button:has-text("Export the session")')
    page.wait_for_selector('a:text-is("download")')
    with page.expect_download() as d:
        page.click('a:text-is("download")')
    d.value.save_as(tmp_path / 's.zip')
    with zipfile.ZipFile(tmp_path / 's.zip') as z:
        files = {n: z.read(n) for n in z.namelist()}
    turns = [json.loads(l) for l in files['turns.jsonl'].splitlines()]
    assert [t['frame'] for t in turns] == [0] * 9 + [2] and turns[-1]['mm_per_px'] == pytest.approx(0.2)
    assert not [(n, x) for n, data in files.items() for x in SECRETS if x.encode() in data]
    (tmp_path / 'broken.png').write_bytes(b'\x89PNG\r\n\x1a\nno')
    upload(page, tmp_path / 'broken.png')
    said(page, 'not a readable image')
    with open(tmp_path / 'huge.png', 'wb') as f:
        f.truncate(41_000_000)
    upload(page, tmp_path / 'huge.png')
    said(page, 'the file has 41 MB; at most 40 MB')
    assert picture.is_visible() and page.title() != '1'
    here = (
        f'http://127.0.0.1:{site[0]}/',
        f'ws://127.0.0.1:{site[0]}/',
        'data:',
        f'blob:http://127.0.0.1:{site[0]}/',
    )
    assert not (foreign := [u for u in asked if not u.startswith(here)]), foreign
    page.close()


@pytest.mark.parametrize('width,scheme', [(1280, 'light'), (800, 'dark')])
def test_without_a_mouse(browser, site, shots, width, scheme):
    """By keys alone: another image, all eight, a map, a token, a judgement; all text reads well and nothing scrolls
    sideways"""
    page, _ = opened(browser, site[0], width, color_scheme=scheme)
    pixels = lambda: page.locator('canvas.picture').first.evaluate('e => e.toDataURL()')
    tab_to(page, 'select')
    page.keyboard.press('ArrowDown')
    said(page, 'Abdomen 2: ready')
    tab_to(page, 'input[placeholder^="a question"]')
    page.keyboard.type('Is it a boy?')
    tab_to(page, 'button.mod-primary')
    page.keyboard.press('Enter')
    page.wait_for_selector('.fada-answers .reason:has-text("fetal_sex")', timeout=60_000)
    tab_to(page, '.fada-ask button:not(.mod-primary)')
    page.keyboard.press('Enter')
    page.wait_for_function("document.querySelectorAll('.fada-answers tr').length === 9")
    said(page, 'done')
    bare = pixels()
    tab_to(page, '.fada-answers tr')
    page.keyboard.press('ArrowDown')
    page.keyboard.press('Enter')
    page.wait_for_selector('.fada-viewer .tokens button >> nth=2', timeout=60_000)
    said(page, 'done')
    page.wait_for_timeout(200)
    whole = pixels()
    assert whole != bare
    tab_to(page, '.tokens button', 'Shift+Tab')
    page.keyboard.press('ArrowRight')
    page.wait_for_timeout(200)
    assert pixels() not in (bare, whole)
    tab_to(page, 'input[placeholder^="your name"]')
    page.keyboard.type('Ada')
    tab_to(page, '.fada-answers tr', 'Shift+Tab')
    page.keyboard.press('a')
    page.wait_for_selector('.fada-answers small:has-text("accepted by Ada")')
    assert page.evaluate(CONTRAST, 'body') == [] and page.evaluate('document.documentElement.scrollWidth') <= width
    ground = lambda: max(
        map(
            int,
            page.locator('#rendered_cells')
            .evaluate(
                "e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (!c.endsWith(', 0)')) return c.match(/[0-9]+/g).slice(0, 3).join(' '); } }"
            )
            .split(),
        )
    )
    assert ground() < 64 if scheme == 'dark' else ground() > 224
    notice_stays(page, '#rendered_cells')
    page.emulate_media(color_scheme=dict(light='dark', dark='light')[scheme])
    page.wait_for_timeout(200)  # the system changes its mind
    assert page.evaluate(CONTRAST, 'body') == [] and (ground() > 128) == (scheme == 'dark')
    page.emulate_media(color_scheme=scheme)
    page.wait_for_timeout(200)
    page.screenshot(path=shots / f'page_keys_{width}_{scheme}.png')
    page.close()


WATCH = """() => { window.states = []; new MutationObserver(() => { for (const e of document.querySelectorAll('.fada-ask .widget-html i')) {
 const s = e.innerText; if (s && states.at(-1) !== s) states.push(s); } }).observe(document.body, {subtree: true, childList: true, characterData: true}); }"""


def test_eight_pages_at_once(browser, site, shots):
    """Each sees its place in the queue and its own answers; one that hangs and one that vanishes keep nobody
    waiting; memory stays flat"""
    pages = [browser.new_context(viewport=dict(width=1280, height=1000)).new_page() for _ in range(8)]
    for p in pages:
        p.goto(f'http://127.0.0.1:{site[0]}/?token={TOKEN}', wait_until='commit')
    for p in pages:
        p.wait_for_selector('button:has-text("All eight questions")', timeout=240_000)
    worker = max(
        (c for c in psutil.Process(site[1].pid).children(recursive=True) if 'fada.serve' in c.cmdline()),
        key=lambda c: c.memory_info().rss,
    )

    def round(some):
        for p in some:
            p.evaluate(WATCH)
            p.click('button:has-text("All eight questions")')
        return worker

    round(pages)
    pages[3].evaluate('() => setTimeout(() => { const end = Date.now()+15_000; while (Date.now() < end); }, 0)')
    pages[7].context.close()
    start = time.perf_counter()
    quick = [p for k, p in enumerate(pages) if k not in (3, 7)]
    done = lambda p: p.wait_for_function("states.at(-1) === 'done'", timeout=60_000)
    for p in quick:
        done(p)
    took = time.perf_counter() - start
    before = worker.memory_info().rss
    worker.suspend()  # so that all six wait for it, however quickly it answers
    try:
        round(quick)
    finally:
        worker.resume()
    for p in quick:
        done(p)
    assert worker.memory_info().rss - before < 30_000_000
    waited = [s for p in quick for s in p.evaluate('states') if s.startswith('queued')]
    assert any(not s.startswith('queued, 0') for s in waited), waited
    texts = {p.locator('.fada-answers').inner_text() for p in quick}
    assert len(texts) == 1 and texts.pop().count('confidence') == 8
    quick[0].fill('input[placeholder^="a question"]', 'A word that is mine alone?')
    quick[0].keyboard.press('Tab')
    quick[0].click('button:text-is("Ask")')
    quick[0].wait_for_selector('.fada-answers td:has-text("mine alone")', timeout=60_000)
    quick[1].click('text=history of this session')
    assert all('mine alone' not in p.content() for p in quick[1:])
    done(pages[3])
    print(f'8 pages, 64 answers: {took:.1f} s')
    for p in pages[:7]:
        p.context.close()


def test_two_visitors_and_a_model_that_dies(browser, site, shots):
    """Two pages at once, one narrow and dark; the worker is killed, the page says so, and the next question is
    answered"""
    one, _ = opened(browser, site[0])
    two, _ = opened(browser, site[0], 800, color_scheme='dark')
    for page in (one, two):
        page.click('button:has-text("All eight questions")')
    for page in (one, two):
        said(page, 'done')
    two.screenshot(path=shots / 'page_800.png')
    assert two.evaluate('document.documentElement.scrollWidth') <= 800
    worker = [c for c in psutil.Process(site[1].pid).children(recursive=True) if 'fada.serve' in c.cmdline()]
    assert len(worker) == 1
    worker[0].kill()
    one.click('button:has-text("All eight questions")')
    one.wait_for_selector(':text("does not answer"), :text("no such session"), :text("went away")', timeout=60_000)
    for _ in range(60):  # until it is back; each try is let come to its end
        one.click('button:has-text("All eight questions")')
        one.wait_for_timeout(1000)
        one.wait_for_selector('button:has-text("All eight questions"):enabled', timeout=60_000)
        if one.locator('i:text-is("done")').count():
            break
    said(one, 'done', 1)
    one.close()
    two.close()


def test_kernels_end_when_their_page_is_gone(site):
    "No kernel outlives its page for long, and none holds a key of a remote service"

    def kernels():
        found = []
        for c in psutil.Process(site[1].pid).children(recursive=True):
            try:
                if 'ipykernel_launcher' in ' '.join(c.cmdline()) and c.status() != psutil.STATUS_ZOMBIE:
                    found.append(c)
            except psutil.Error:
                pass  # gone meanwhile
        return found

    assert all('OPENAI_API_KEY' not in k.environ() for k in kernels())
    for _ in range(100):
        if not kernels():
            break
        time.sleep(1)
    assert not kernels()
