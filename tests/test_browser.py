"JupyterLab and the report in a real Chromium, as a person would use them. Screenshots go to outputs/screenshots."

import json, os, shutil, socket, subprocess, sys, time, urllib.request

import pytest

pytestmark = pytest.mark.browser
FLAGS = [
    '--no-sandbox',
    '--disable-gpu',
    '--disable-background-networking',
    '--disable-component-update',
    '--no-first-run',
]


@pytest.fixture(scope='module')
def browser():
    from playwright.sync_api import sync_playwright

    path = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    assert path, (
        'no Chromium: install it (Debian: apt-get install chromium) or leave the browser tests out: make test'
    )
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=path, headless=True, args=FLAGS)
        yield b
        b.close()


@pytest.fixture(scope='module')
def shots(root):
    d = root / 'outputs' / 'screenshots'
    d.mkdir(parents=True, exist_ok=True)
    return d


@pytest.fixture(scope='module')
def lab(root, tmp_path_factory):
    "A JupyterLab on loopback with a token, over a copy of the notebooks, so that saving changes nothing here"
    home = tmp_path_factory.mktemp('lab')
    shutil.copytree(root / 'nbs' / 'app', home / 'app')
    (home / 'settings.ini').write_text(f'[data]\nfolder = {home}/none\n[output]\nfolder = {home}/outputs\n')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    log = open(home / 'lab.log', 'w')
    p = subprocess.Popen(
        [
            sys.executable,
            '-m',
            'jupyterlab',
            '--no-browser',
            '--ip=127.0.0.1',
            f'--port={port}',
            '--ServerApp.port_retries=0',
            '--IdentityProvider.token=t0ken',
            f'--ServerApp.root_dir={home}',
            '--allow-root',
        ],
        stdout=log,
        stderr=log,
        cwd=home,
        env=dict(
            os.environ,
            JUPYTER_CONFIG_DIR=str(home / 'config'),
            JUPYTERLAB_SETTINGS_DIR=str(home / 'settings'),
            JUPYTERLAB_WORKSPACES_DIR=str(home / 'workspaces'),
        ),
        start_new_session=True,
    )
    base = f'http://127.0.0.1:{port}'
    for _ in range(120):
        try:
            urllib.request.urlopen(f'{base}/api/status?token=t0ken', timeout=2)
            break
        except OSError:
            time.sleep(0.5)
    else:
        raise AssertionError((home / 'lab.log').read_text()[-2000:])
    yield base
    p.terminate()
    p.wait(20)


def _open(browser, lab, notebook, ready='button:has-text("All eight questions")'):
    page = browser.new_page(viewport=dict(width=1280, height=1000))
    page.goto(f'{lab}/lab/tree/app/{notebook}?token=t0ken&reset')
    page.wait_for_selector('.jp-NotebookPanel .jp-CodeCell', timeout=60_000)
    page.wait_for_selector('.jp-NotebookPanel .jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=60_000)
    for _ in range(
        20
    ):  # Lab shows the kernel as idle before it is connected, and drops what it is told to run until then
        page.keyboard.press('Escape')
        page.locator('.jp-NotebookPanel .jp-CodeCell .jp-InputArea-editor').first.click()
        page.keyboard.press('Control+Enter')
        page.wait_for_timeout(1500)
        prompts = page.locator('.jp-NotebookPanel .jp-InputPrompt').all_inner_texts()
        if any(p.strip() not in ('', '[ ]:') for p in prompts):
            break
    page.wait_for_selector(ready, timeout=240_000)
    return page


def test_ask_in_jupyterlab(browser, lab, shots):
    "Open the panel, see a phantom, ask all eight, then one of one's own; what is typed stays text"
    page = _open(browser, lab, 'ask.ipynb')
    page.wait_for_function("document.querySelector('canvas.picture')?.width === 480")
    assert page.locator('text=Not a medical device').first.is_visible()
    page.click('button:has-text("All eight questions")')
    page.wait_for_selector('td:has-text("How is the image quality?")', timeout=60_000)
    assert page.locator('.jp-OutputArea table tr').count() == 9
    page.screenshot(path=shots / 'ask.png')
    page.fill('input[placeholder^="a question"]', '<img src=x onerror="document.title=1"> ?')
    page.keyboard.press('Tab')
    page.click('button:has-text("Ask")')
    page.wait_for_selector('td:has-text("<img src=x")', timeout=60_000)
    assert page.title() != '1'
    page.close()


def _pixels(page, k=0):
    "What a canvas shows"
    return page.locator('canvas.picture').nth(k).evaluate('e => e.toDataURL()')


def _steady(page):
    "The canvas once it was drawn anew"
    page.wait_for_timeout(300)
    return _pixels(page)


def test_attention_in_jupyterlab(browser, lab, shots):
    """The map lies over the image; a token and the opacity change it at once; keys stay in the picture, and no cell
    is deleted"""
    page = _open(browser, lab, 'attention.ipynb')
    page.wait_for_timeout(500)
    bare = _pixels(page)
    cells = page.locator('.jp-Cell').count()
    page.fill('input[placeholder^="a question"]', 'What is the fetal orientation?')
    page.keyboard.press('Tab')
    page.click('button:has-text("Ask")')
    page.wait_for_selector('.fada-viewer .badge:has-text("this model")', timeout=240_000)
    whole = _steady(page)
    assert whole != bare
    assert page.locator('.fada-viewer .note:visible').first.inner_text().endswith('attention is not evidence.')
    page.locator('.fada-viewer .tokens button').nth(1).click()
    token = _steady(page)
    assert token != whole
    assert float(page.locator('canvas.picture').first.get_attribute('data-ms')) < 50
    page.locator('canvas.picture').first.click()
    page.keyboard.press(']')
    stronger = _steady(page)
    assert stronger != token
    page.keyboard.press('+')
    closer = _steady(page)
    assert closer != stronger
    for key in ('d', 'd', '0'):
        page.keyboard.press(key)
    assert _steady(page) == stronger and page.locator('.jp-Cell').count() == cells
    page.screenshot(path=shots / 'attention.png')
    page.close()


def test_judge_and_export_in_jupyterlab(browser, lab, shots, tmp_path):
    """An answer is accepted, edited and rejected by keys; a name is asked for first; the session is exported and
    runs again"""
    import zipfile

    page = _open(browser, lab, 'ask.ipynb')
    cells = page.locator('.jp-Cell').count()
    page.click('button:has-text("All eight questions")')
    page.wait_for_selector('i:text-is("done")', timeout=120_000)
    row = page.locator('.fada-answers tr').nth(1)
    row.focus()
    page.keyboard.press('a')
    page.wait_for_selector(':text("a judgement without a name")')
    page.fill('input[placeholder^="your name"]', 'A<b>da')
    page.keyboard.press('Tab')
    row.focus()
    page.keyboard.press('a')
    page.wait_for_selector('small:has-text("accepted by A<b>da")')
    page.keyboard.press('ArrowDown')
    page.keyboard.press('r')
    page.wait_for_selector('small:has-text("rejected by A<b>da")')
    page.keyboard.press('ArrowDown')
    page.keyboard.press('e')
    page.keyboard.type('<img src=x onerror="document.title=1">')
    page.keyboard.press('Enter')
    page.wait_for_selector('small:has-text("changed to “<img src=x")')
    page.keyboard.press('d')
    page.keyboard.press('d')
    assert page.locator('.jp-Cell').count() == cells and page.title() != '1'
    page.screenshot(path=shots / 'judged.png')
    page.click('button:has-text("Export the session")')
    page.wait_for_selector('a:text-is("download")')
    with page.expect_download() as d:
        page.click('a:text-is("download")')
    d.value.save_as(tmp_path / 's.zip')
    page.close()
    with zipfile.ZipFile(tmp_path / 's.zip') as z:
        z.extractall(tmp_path / 's')
        assert {'again.ipynb', 'answers.csv', 'turns.jsonl', 'corrections.jsonl'} <= set(z.namelist())
    judged = [json.loads(l) for l in (tmp_path / 's' / 'corrections.jsonl').read_text().splitlines()]
    assert [(j['n'], j['kind'], j['who']) for j in judged] == [
        (1, 'accept', 'A<b>da'),
        (2, 'reject', 'A<b>da'),
        (3, 'edit', 'A<b>da'),
    ]
    import papermill

    book = papermill.execute_notebook(
        tmp_path / 's' / 'again.ipynb', tmp_path / 'out.ipynb', cwd=tmp_path / 's', progress_bar=False
    )
    table = str(book.cells[-1].outputs)
    assert table.count('True') >= 8 and 'False' not in table


def _put_notebook(lab, name, path, words, **literals):
    "Send the cells of a notebook that hold one of `words` to Lab as one cell, its `name = \"\"` lines filled in"
    book = json.loads(path.read_text())
    texts = [''.join(c['source']) for c in book['cells']]
    source = '\n'.join(t for t in texts if any(w in t for w in words))
    for k, v in literals.items():
        source = source.replace(f'{k} = ""', f'{k} = {v!r}')
    book['cells'] = [dict(cell_type='code', id='one', metadata={}, outputs=[], execution_count=None, source=source)]
    body = json.dumps(dict(type='notebook', format='json', content=book)).encode()
    urllib.request.urlopen(urllib.request.Request(f'{lab}/api/contents/app/{name}?token=t0ken', body, method='PUT'))


def test_keys_of_the_annotation_panel(browser, lab, shots, root, tmp_path):
    "A picture is read by keys alone: numbers pick, Enter takes, Backspace goes back, d d deletes no cell"
    from fada.annotate import annotations
    from fada.phantoms import make_phantom
    from PIL import Image

    (tmp_path / 'Femur').mkdir()
    for k in range(2):
        Image.fromarray(make_phantom('Femur', (5, k, 0)).image).save(tmp_path / 'Femur' / f'{k}.png')
    _put_notebook(
        lab,
        'keys.ipynb',
        root / 'nbs' / 'app' / 'explore_data.ipynb',
        ('load_settings', 'annotation_panel'),
        data=str(tmp_path),
        who='Ada',
    )
    page = _open(browser, lab, 'keys.ipynb', 'button.fada-take')
    cells = page.locator('.jp-Cell').count()
    at = lambda q, k=1: page.wait_for_selector(
        f'.fada-annotate :text("picture {k} of 2 · question {q} of 8")', timeout=60_000
    )
    free = page.locator('.fada-annotate input')
    at(1)
    free.click()
    page.keyboard.press('1')
    page.wait_for_selector('.fada-annotate :text("add more, then Take")')
    first = free.input_value()
    page.keyboard.press('3')
    page.wait_for_function("e => e.value.includes(', ')", arg=free.element_handle())
    assert first and free.input_value().startswith(f'{first}, ')
    page.screenshot(path=shots / 'annotate.png')
    page.keyboard.press('Enter')
    at(2)
    page.keyboard.press('d')
    page.keyboard.press('d')
    assert page.locator('.jp-Cell').count() == cells
    free.click()
    page.keyboard.type('axial, 2 spines seen')
    page.keyboard.press('Enter')
    at(3)
    page.keyboard.press('9')
    page.keyboard.press('Backspace')
    at(2)  # there is no ninth choice
    page.keyboard.press('1')
    at(3)
    for q in range(3, 9):
        at(q)
        page.keyboard.press('1')
    at(1, 2)
    log = annotations(tmp_path)
    page.close()
    assert log.question_id.tolist() == [1, 2, 2, *range(3, 9)] and set(log.who) == {'Ada'} and all(log.after)
    assert log.after[2] == 'axial, 2 spines seen'


def test_explorer_in_jupyterlab(browser, lab, shots, root, tmp_path, small_data):
    "Filter by category, split, question and words, turn pages, see the quarantine, append a correction"
    from fada.annotate import annotations

    d = tmp_path / 'phantoms'
    shutil.copytree(small_data, d)
    _put_notebook(
        lab,
        'explore.ipynb',
        root / 'nbs' / 'app' / 'explore_data.ipynb',
        ('load_settings', 'explore(folder)'),
        data=str(d),
    )
    page = _open(browser, lab, 'explore.ipynb', 'button:has-text("Append correction")')
    info = page.locator('.widget-html:has-text(" of ")').first
    shown = lambda text: page.wait_for_selector(f'.widget-html :text("{text}")', timeout=30_000)
    pick = lambda label, value: page.locator(f'.widget-dropdown:has(label:text-is("{label}")) select').select_option(
        value
    )
    shown('1 of 60')
    pick('category', 'Femur')
    shown('1 of 30')
    pick('split', 'val')
    page.wait_for_function("e => /Femur · val · 1 of \\d+$/.test(e.innerText.trim())", arg=info.element_handle())
    page.click('button:has-text("▶")')
    shown('2 of')
    page.click('button:has-text("◀")')
    shown('1 of')
    pick('question', 'normality')
    words = page.locator('input[placeholder="words in an answer"]')
    words.fill('no such words')
    shown('nothing fits')
    words.fill('')
    shown('1 of')
    page.fill('input[placeholder^="your name"]', 'Ada')
    pick('correct', 'quality')
    page.fill('input[placeholder="the right answer"]', 'poor <b>indeed</b>')
    page.keyboard.press('Tab')
    page.click('button:has-text("Append correction")')
    shown('poor <b>indeed</b>')
    page.screenshot(path=shots / 'explore.png')
    page.click('text=distributions')
    page.screenshot(path=shots / 'explore_plots.png')
    page.close()
    log = annotations(d)
    assert (
        log.after.tolist() == ['poor <b>indeed</b>']
        and log.who.tolist() == ['Ada']
        and log.question_id.tolist() == [6]
    )


def test_report_opens_offline(browser, shots, small_data, tmp_path):
    "The report asks nothing of any host, and its pictures are there"
    from fada.report import write_report
    from fada.evaluate import evaluate_job
    from fada.settings import load_settings

    s = load_settings(model='blip2-nano', precision='fp32', categories='all', data=small_data)
    evaluate_job(s, tmp_path / 'run' / 'evaluate', control_images=12)
    report = write_report(tmp_path / 'run', small_data)
    page = browser.new_page(viewport=dict(width=1280, height=900))
    asked = []
    page.on('request', lambda r: asked.append(r.url))
    page.goto(report.as_uri())
    page.wait_for_load_state('networkidle')
    assert [u for u in asked if not u.startswith(('file:', 'data:'))] == []
    widths = page.locator('img').evaluate_all('es => es.map(e => e.naturalWidth)')
    assert len(widths) >= 8 and min(widths) > 0
    page.screenshot(path=shots / 'report.png', full_page=True)
    for width in (800, 400):
        page.set_viewport_size(dict(width=width, height=900))
        # wide tables scroll inside their own box
        assert page.evaluate('document.documentElement.scrollWidth') <= width
    page.close()
