"`fada app` as a visitor meets it: the page in a real Chromium, the model in a process of its own."
import http.client, os, signal, subprocess, sys, time
import psutil
import pytest
from test_browser import browser, shots                                      # noqa: fixtures
from test_serve import free_port

pytestmark = pytest.mark.browser
TOKEN = 'page-token-0'

@pytest.fixture(scope='module')
def site(tmp_path_factory, root):
    "A page and its model; (url, process, log)"
    port = free_port(); d = tmp_path_factory.mktemp('app'); log = open(d/'log', 'w')
    (d/'settings.ini').write_text(f'[output]\nfolder = {d}/outputs\n[data]\nfolder = {d}/none\n'); (d/'nbs').symlink_to(root/'nbs')
    p = subprocess.Popen([sys.executable, '-m', 'fada.cli', 'app', '--no-browser', '--port', str(port), '--idle', '20'], cwd=d, stdout=log, stderr=log,
                         env=dict(os.environ, FADA_TOKEN=TOKEN, FADA_THREADS='1', OPENAI_API_KEY='sk-not-for-pages'), start_new_session=True)
    for _ in range(900):
        if 'The page:' in (d/'log').read_text(): break
        assert p.poll() is None, (d/'log').read_text(); time.sleep(.1)
    yield port, p, d/'log'
    children = psutil.Process(p.pid).children(recursive=True); p.send_signal(signal.SIGINT); assert p.wait(60) == 0
    gone, alive = psutil.wait_procs(children, timeout=15); assert not alive     # worker, page and kernels are gone
    assert 'Traceback' not in (d/'log').read_text()

def get(port, path, **headers):
    c = http.client.HTTPConnection('127.0.0.1', port, timeout=30); c.putrequest('GET', path, skip_host='Host' in headers)
    for k, v in headers.items(): c.putheader(k, v)
    c.endheaders(); r = c.getresponse(); to = r.getheader('Location', '')
    return get(port, to+f'?token={TOKEN}') if 'voila/files' in to else (r.status, r.read())   # what lies beside the notebook is asked for there

def opened(browser, port, width=1280, **kw):
    page = browser.new_page(viewport=dict(width=width, height=1000), **kw); asked = []
    page.on('request', lambda r: asked.append(r.url)); page.goto(f'http://127.0.0.1:{port}/?token={TOKEN}')
    page.wait_for_selector('button:has-text("All eight questions")', timeout=120_000); return page, asked

def test_the_door_of_the_page(site):
    "Without token: nothing of the notebook; another host, files beside it, paths out of it: refused; no source, no key in a kernel"
    port = site[0]; status, text = get(port, '/'); assert status in (302, 401, 403) and b'panel' not in text
    for path in ('/?token=wrong', '/voila/render/page.ipynb'): assert get(port, path)[0] in (302, 401, 403), path
    assert get(port, f'/?token={TOKEN}', Host='evil.example')[0] == 403
    for path in ('/voila/files/page.ipynb', '/voila/files/voila.json', '/voila/static/../../../etc/passwd', '/files/page.ipynb', '/api/contents'):
        assert get(port, f'{path}?token={TOKEN}')[0] in (403, 404), path

def test_ask_on_the_page(browser, site, shots, tmp_path):
    "Pick, ask all eight, ask in one's own words, upload a DICOM and a broken file; nothing from another host, no source shown"
    page, asked = opened(browser, site[0]); page.click('button:has-text("All eight questions")')
    page.wait_for_selector('td:has-text("How is the image quality?")', timeout=60_000); assert page.locator('table tr').count() == 9
    page.screenshot(path=shots/'page_1280.png')
    page.fill('input[placeholder^="a question"]', '<img src=x onerror="document.title=1"> ?'); page.keyboard.press('Tab')
    page.click('button:has-text("Ask")'); page.wait_for_selector('td:has-text("<img src=x")', timeout=60_000)
    assert page.title() != '1' and 'from fada' not in page.content() and page.locator('text=Not a medical device').first.is_visible()
    from pydicom.data import get_testdata_file
    with page.expect_file_chooser() as c: page.click('button:has-text("or open")')
    c.value.set_files(get_testdata_file('examples_rgb_color.dcm')); page.wait_for_selector(':text("unlike the training images")', timeout=60_000)
    (tmp_path/'broken.png').write_bytes(b'\x89PNG\r\n\x1a\nno')
    with page.expect_file_chooser() as c: page.click('button:has-text("or open")')
    c.value.set_files(tmp_path/'broken.png'); page.wait_for_selector(':text("not a readable image")', timeout=60_000)
    foreign = [u for u in asked if not u.startswith((f'http://127.0.0.1:{site[0]}/', f'ws://127.0.0.1:{site[0]}/', 'data:', 'blob:'))]; assert not foreign, foreign
    page.close()

def test_two_visitors_and_a_model_that_dies(browser, site, shots):
    "Two pages at once, one narrow and dark; the worker is killed, the page says so, and the next question is answered"
    one, _ = opened(browser, site[0]); two, _ = opened(browser, site[0], 800, color_scheme='dark')
    for page in (one, two): page.click('button:has-text("All eight questions")')
    for page in (one, two): page.wait_for_selector('td:has-text("How is the image quality?")', timeout=60_000)
    two.screenshot(path=shots/'page_800.png'); assert two.evaluate('document.documentElement.scrollWidth') <= 800
    worker = [c for c in psutil.Process(site[1].pid).children(recursive=True) if 'fada.serve' in c.cmdline()]; assert len(worker) == 1; worker[0].kill()
    one.click('button:has-text("All eight questions")')
    one.wait_for_selector(':text("does not answer"), :text("no such session"), :text("went away")', timeout=60_000)
    for _ in range(60):
        one.click('button:has-text("All eight questions")'); one.wait_for_timeout(1000)
        if one.locator('i:text-is("done")').count(): break
    assert one.locator('i:text-is("done")').count(); one.close(); two.close()

def test_kernels_end_when_their_page_is_gone(site):
    "No kernel outlives its page for long, and none holds a key of a remote service"
    def kernels():
        found = []
        for c in psutil.Process(site[1].pid).children(recursive=True):
            try:
                if 'ipykernel_launcher' in ' '.join(c.cmdline()) and c.status() != psutil.STATUS_ZOMBIE: found.append(c)
            except psutil.Error: pass   # gone meanwhile
        return found
    assert all('OPENAI_API_KEY' not in k.environ() for k in kernels())
    for _ in range(100):
        if not kernels(): break
        time.sleep(1)
    assert not kernels()
