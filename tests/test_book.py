"The book: every link leads somewhere, every public name has its place; the wheel works away from the clone."

import json, os, random, re, shutil, signal, socket, subprocess, sys, sysconfig, time, urllib.request
import zipfile
from pathlib import Path
import pytest
from fada.book import (
    LOOK,
    PAGES,
    Page,
    book_parts,
    check_book,
    chapters,
    finding_ids,
    notebook_html,
    read_chapter,
    run_command,
    set_links,
    symbols,
    write_book,
)
from fada.settings import SETTINGS, FadaError

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = sorted((ROOT / 'nbs' / 'tutorials').glob('*.ipynb'))


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    "(folder of the book, what `book_parts` gave for it)"
    import fada.book

    folder, given = tmp_path_factory.mktemp('book'), []
    with pytest.MonkeyPatch.context() as m:
        m.setattr(fada.book, 'book_parts', lambda root: given.append(book_parts(root)) or given[0])
        write_book(ROOT, folder)
    return folder, given[0]


@pytest.fixture(scope='module')
def book(written):
    return written[0]


@pytest.mark.slow
def test_parts_stand_in_the_order_of_somebody_new(written):
    "Each part has pages, each page a title and a file of its own; public names lead to pages that are there"
    folder, (parts, found) = written
    pages = [p for _, ps in parts for p in ps]
    assert [part for part, _ in parts] == [
        'Begin',
        'Tutorials',
        'Run and app notebooks',
        'Reference',
        'Chapters',
        'Project',
    ]
    assert all(isinstance(p, Page) and p.title and (folder / p.page).is_file() for p in pages)
    assert len({p.page for p in pages}) == len(pages) and {page for _, page in found} <= {p.page for p in pages}


@pytest.mark.slow
def test_every_link_leads_somewhere(book):
    assert check_book(book) == []


@pytest.mark.slow
def test_every_public_name_is_on_a_page(book):
    "All of each module's `__all__`, as Python itself reads it"
    import importlib

    text = {c.module: (book / c.page).read_text() for c in chapters(ROOT / 'nbs') if c.module}
    index = (book / 'ref-names.html').read_text()
    for module, page in text.items():
        for name in importlib.import_module(f'fada.{module}').__all__:
            assert f'id="fada.{module}.{name}"' in page, f'{module}.{name}'
            assert f'#fada.{module}.{name}"' in index, f'{module}.{name}'


@pytest.mark.slow
def test_reference_pages_hold_every_row(book):
    from fada.cli import app
    from fada.metrics import MAIN_SCORE
    from fada.registry import MODELS

    page = lambda name: (book / f'ref-{name}.html').read_text()
    assert [m for m in MODELS if f'>{m}</td>' not in page('models')] == []
    assert [k for _, k, *_ in SETTINGS.values() if f'>{k}</td>' not in page('settings')] == []
    assert [m for m in MAIN_SCORE.values() if m not in page('metrics')] == []
    assert [i for i in finding_ids(ROOT / 'fada' / 'audit.py') if f'>{i}</td>' not in page('audit')] == []
    commands = [c.name or c.callback.__name__ for c in app.registered_commands]
    assert [c for c in commands if f'id="fada-{c.replace("_", "-")}"' not in page('commands')] == []


def test_findings_are_those_that_the_audit_gives():
    "Ids read from the code against the ids in its text"
    text = (ROOT / 'fada' / 'audit.py').read_text()
    known = set(finding_ids(ROOT / 'fada' / 'audit.py'))
    assert set(re.findall(r"Finding\('([\w-]+)'", text)) <= known
    assert {'survives-without-image', 'refusals', 'sensitivity-zero', 'leak-image', 'leak-near'} <= known
    assert finding_ids(ROOT / 'fada' / 'audit.py')['specificity-zero'][1] == {'red'}


def test_every_written_page_is_in_the_book():
    assert sorted(p.stem for p in (ROOT / 'nbs' / 'pages').glob('*.md')) == sorted(PAGES)


def test_outside_text_is_escaped():
    from fada.book import Symbol, api_html

    told = api_html([Symbol('f', 'm', 'def f(x="<script>")', '<img src=x onerror=alert(1)>', True)])
    assert '<script>' not in told and '<img' not in told


def test_a_link_to_nothing_is_found(tmp_path):
    (tmp_path / 'a.html').write_text('<a href="b.html#x">b</a><img src="//cdn.example/x.png">')
    (tmp_path / 'b.html').write_text('<p id="y">')
    assert [b[2] for b in check_book(tmp_path)] == ['loaded from another host', 'no such place on the page']


def test_names_are_linked_only_where_they_mean_one_thing():
    names = {'load': '07_vlm.html#fada.vlm.load'}
    assert set_links('<code>load</code> <pre><code>load</code></pre>', {}, names).count('<a ') == 1


def test_a_notebook_without_title_is_named(tmp_path):
    import nbformat

    nbformat.write(nbformat.v4.new_notebook(), tmp_path / 'x.ipynb')
    with pytest.raises(FadaError, match='x.ipynb'):
        read_chapter(tmp_path / 'x.ipynb')


def test_hidden_cells_stay_behind(tmp_path):
    import nbformat

    code = nbformat.v4.new_code_cell
    nb = nbformat.v4.new_notebook(cells=[code('#| hide\nsecret = 1'), code('#| export\nshown = 2')])
    nbformat.write(nb, tmp_path / 'x.ipynb')
    page = notebook_html(tmp_path / 'x.ipynb')
    assert 'secret' not in page and 'shown' in page and '#|' not in page


def test_commands_in_a_cell_fail_as_errors():
    with pytest.raises(FadaError, match='no model|unknown model|did you mean'):
        run_command('models show blip3-nano')
    with pytest.raises(FadaError, match='No such option'):
        run_command('biometry FL --weeks 20')


def test_every_public_function_says_what_it_does():
    without = [
        f'{p.stem}.{s.name}'
        for p in sorted((ROOT / 'fada').glob('*.py'))
        if not p.stem.startswith('_')
        for s in symbols(p)
        if s.code and not s.doc
    ]
    assert without == []


@pytest.mark.slow
@pytest.mark.parametrize('path', TUTORIALS, ids=lambda p: p.stem)
def test_tutorial(path, tmp_path, monkeypatch):
    "Each tutorial from top to bottom, in a folder of its own"
    from nbdev import test as nbt

    shutil.copy(path, tmp_path)
    shutil.copy(ROOT / 'pyproject.toml', tmp_path)
    monkeypatch.setenv('XDG_CONFIG_HOME', str(tmp_path / 'config'))
    ok, _ = nbt.test_nb(tmp_path / path.name, skip_flags=['cuda'])
    assert ok


def _venv(folder, wheel) -> Path:
    "An empty environment that has the installed dependencies of this one and the wheel, but not the clone"
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', folder], check=True)
    where = sysconfig.get_path('purelib', vars=dict(base=str(folder), platbase=str(folder)))
    here = Path(sysconfig.get_path('purelib'))
    with zipfile.ZipFile(wheel) as z:
        z.extractall(where)
    # a plain path: the .pth in there that leads to the clone is not followed
    (Path(where) / 'dependencies.pth').write_text(f'{here}\n')
    # templates and kernels, which an installation of the dependencies puts there
    share = Path(folder) / 'share'
    share.mkdir(exist_ok=True)
    (share / 'jupyter').symlink_to(Path(sys.prefix) / 'share' / 'jupyter', target_is_directory=True)
    return Path(folder) / ('Scripts' if os.name == 'nt' else 'bin') / 'python'


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "The wheel, built from the source archive, built from a copy of the clone"
    d = tmp_path_factory.mktemp('wheel')
    clone = d / 'clone'
    clone.mkdir()
    for name in ('fada', 'nbs'):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for name in ('pyproject.toml', 'README.md', 'LICENSE', 'MANIFEST.in'):
        shutil.copy(ROOT / name, clone)
    r = subprocess.run(
        [sys.executable, '-m', 'build', '--no-isolation', '--outdir', d, clone], capture_output=True, text=True
    )
    assert r.returncode == 0, r.stdout[-2000:] + r.stderr[-2000:]
    return next(d.glob('*.whl'))


@pytest.mark.slow
def test_notebooks_travel_in_the_wheel(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for p in [*(ROOT / 'nbs' / 'run').glob('*.ipynb'), *(ROOT / 'nbs' / 'app').glob('*.ipynb'), *TUTORIALS]:
        assert f'fada/notebooks/{p.parent.name}/{p.name}' in names
    assert {f'fada/assets/book/{p.name}' for p in LOOK.iterdir()} <= names
    assert not any(n.startswith(('nbs/', 'tests/', 'data/', 'fada/notebooks/0')) for n in names)


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
    "The wheel in an environment of its own, away from the clone: (its python, a home, variables)"
    d = tmp_path_factory.mktemp('installed')
    python = _venv(d / 'env', wheel)
    home = d / 'home'
    home.mkdir()
    env = {**os.environ, 'XDG_CONFIG_HOME': str(home), 'OMP_NUM_THREADS': '1', 'FADA_THREADS': '1'}
    env.pop('PYTHONPATH', None)
    return python, home, env


def _ran(installed, *words):
    python, home, env = installed
    r = subprocess.run([python, *words], cwd=home, env=env, capture_output=True, text=True)
    assert r.returncode == 0, (words, r.stderr[-2000:])
    return r.stdout


@pytest.mark.slow
def test_the_wheel_works_alone(installed):
    "Help, phantoms, an answer, a training, an evaluation, a grid and the notebooks, away from the clone"
    home = installed[1]
    fada = lambda *words: _ran(installed, '-m', 'fada.cli', *words)
    said = lambda code: _ran(installed, '-c', code)
    assert str(home.parent / 'env') in said('import fada; print(fada.__file__)')
    assert 'phantom' in fada('--help') and '--small' in fada('demo', '--help')
    fada('phantom', '--n', '24', '--categories', 'Femur', '--out', 'data', '--quiet')
    image = next((home / 'data' / 'images').rglob('*.png'))
    assert 'not a medical device' in fada('ask', str(image), 'plane').lower()
    fada(
        'train',
        '--data',
        'data',
        '--categories',
        'Femur',
        '--out',
        'femur',
        '--steps',
        '2',
        '--checks',
        '1',
        '--quiet',
    )
    adapter = next(home.glob('femur/**/fada.json')).parent
    fada(
        'evaluate',
        '--data',
        'data',
        '--categories',
        'Femur',
        '--adapter',
        str(adapter),
        '--images',
        '2',
        '--control-images',
        '2',
        '--out',
        'scores',
        '--quiet',
    )
    assert (home / 'scores' / 'metrics.json').is_file()
    (home / 'night.toml').write_text(
        'models = ["blip2-nano"]\ncategories = ["Femur"]\nprecisions = ["fp32"]\nseeds = [0]\n'
        'tasks = ["baseline", "train", "evaluate"]\ndata = "data"\n'
    )
    jobs = json.loads(fada('batch', 'night.toml', '--dry-run', '--json'))['jobs']
    assert len(jobs) == 3 and not (home / 'outputs').exists()
    fada('notebooks', 'work')
    assert (home / 'work' / 'app' / 'ask.ipynb').is_file()
    run = (
        'from fada.batch import run_notebooks, notebook_parameters as p; n = run_notebooks(); print(n); '
        'assert p(n/"train.ipynb") and (n.parent/"app"/"ask.ipynb").is_file()'
    )
    assert str(home.parent / 'env') in said(run)


@pytest.mark.slow
def test_the_wheel_serves_the_page(installed):
    "`fada app` of the wheel: the page with the panel in it, for who has the token; Ctrl-C ends it"
    python, home, env = installed
    free = lambda p: socket.socket().connect_ex(('127.0.0.1', p)) != 0
    port = next(p for p in random.sample(range(20_000, 60_000), 50) if free(p) and free(p + 1))
    with open(home / 'log', 'w') as log:
        p = subprocess.Popen(
            [python, '-m', 'fada.cli', 'app', '--no-browser', '--port', str(port)],
            cwd=home,
            env={**env, 'FADA_TOKEN': 'of-this-test'},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        for _ in range(900):
            if 'The page:' in (home / 'log').read_text():
                break
            assert p.poll() is None, (home / 'log').read_text()
            time.sleep(0.1)
        get = lambda path: urllib.request.urlopen(f'http://127.0.0.1:{port}{path}', timeout=120).read().decode()
        page, panel = get('/?token=of-this-test'), 'application/vnd.jupyter.widget-view+json'
        assert panel in page and 'Traceback' not in page and panel not in get('/')  # not without the token
    finally:
        p.send_signal(signal.SIGINT)
        assert p.wait(60) == 0
