"Runs that are interrupted: nothing done is lost, the next run goes on, no process is left behind."

import json, os, signal, subprocess, sys, time
from pathlib import Path
import psutil
import pytest
from commands import FADA, typed

pytestmark = pytest.mark.fault


def _files(folder):
    return {
        p.relative_to(folder): p.read_bytes()
        for p in sorted(Path(folder).rglob('*'))
        if p.is_file() and p.name != 'manifest.json'
    }


def _wait(condition, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, 'waited in vain'
        time.sleep(0.05)


@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGINT])
def test_interrupted_phantoms_go_on_with_the_same_bytes(tmp_path, how):
    whole, broken = tmp_path / 'whole', tmp_path / 'broken'
    command = lambda out: typed('phantom --n 60 --categories Femur,Thorax --out {out} --seed 3 --quiet', out=out)
    subprocess.run(command(whole), check=True)
    p = subprocess.Popen(command(broken), start_new_session=True, stderr=subprocess.PIPE, text=True)
    _wait(lambda: len(list(broken.glob('truth/*/*.json'))) > 10)
    os.killpg(p.pid, how) if how == signal.SIGKILL else os.killpg(p.pid, signal.SIGINT)
    err = p.communicate(timeout=60)[1]
    assert p.returncode != 0
    if how == signal.SIGINT:
        assert 'what is done is kept' in err
    done = {f: f.stat().st_mtime_ns for f in broken.glob('truth/*/*.json')}
    assert 10 < len(done) < 60
    subprocess.run(command(broken), check=True)
    assert all(f.stat().st_mtime_ns == t for f, t in done.items())  # what was done was not done again
    a, b = _files(whole), _files(broken)
    assert {k: v for k, v in a.items() if '.part' not in str(k)} == {
        k: v for k, v in b.items() if '.part' not in str(k)
    }


def test_killed_evaluation_asks_only_what_is_missing(tmp_path, small_data):
    out = tmp_path / 'job'
    log = out / 'answers.jsonl'
    command = typed(
        'evaluate --model blip2-nano --data {data} --out {out} --categories all --control-images 12 --json --quiet',
        data=small_data,
        out=out,
    )
    p = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    _wait(lambda: log.exists() and log.stat().st_size > 1000)
    os.killpg(p.pid, signal.SIGKILL)
    p.wait()
    before = log.read_text().splitlines()
    r = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    records = [json.loads(l) for l in log.read_text().splitlines()]
    assert [json.dumps(x) for x in records[: len(before) - 1]] == [json.dumps(json.loads(l)) for l in before[:-1]]
    assert len(records) == len({x['key'] for x in records}) and r['coverage']['failed'] == 0


def test_interrupted_demo_leaves_no_process_and_goes_on(tmp_path, root):
    command = typed('demo --small --out {out} --data {data} --json', out=tmp_path / 'run', data=tmp_path / 'phantoms')
    p = subprocess.Popen(
        command,
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ, FADA_QUIET='0'),
    )
    _wait(
        lambda: (
            (tmp_path / 'run' / 'prepare' / 'done.json').exists()
            and (tmp_path / 'run' / 'base.part' / 'run.log').exists()
        ),
        240,
    )
    time.sleep(3)
    children = psutil.Process(p.pid).children(recursive=True)
    assert children
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=60)
    assert p.returncode == 130 and out == '' and 'Traceback' not in err
    gone, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    r = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    result = json.loads(r.stdout)
    assert (
        result['jobs']['prepare'] == 'reused'
        and result['jobs']['base'] == 'done'
        and Path(result['report']).stat().st_size > 100_000
    )
    again = json.loads(subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout)
    assert set(again['jobs'].values()) == {'reused'}


@pytest.mark.parametrize(
    'words,said',
    [
        (('evaluate', '--data', '{missing}'), 'no question table'),
        (('prepare', '--data', '{missing}', '--source', 'folder'), 'image folder is missing'),
        (('train', '--data', '{data}', '--categories', 'Femru'), 'did you mean Femur'),
        (('evaluate', '--data', '{data}', '--model', 'blip-nano'), 'did you mean blip2-nano'),
        (('evaluate', '--data', '{data}', '--out', '{file}/x'), 'cannot be written'),
        (('evaluate', '--data', '{data}', '--adapter', '{missing}'), 'file not found'),
        (('compare', '{data}'), 'no evaluation'),
        (('phantom', '--out', '{data}', '--n', '7'), 'another set of phantoms'),
    ],
)
def test_bad_input_is_one_sentence(words, said, tmp_path, small_data):
    (tmp_path / 'file').write_text('')
    words = [w.format(missing=tmp_path / 'missing', data=small_data, file=tmp_path / 'file') for w in words]
    r = subprocess.run([*FADA, *words], cwd=tmp_path, capture_output=True, text=True)
    assert (r.returncode, r.stdout) == (1, '') and said in r.stderr and len(r.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize('word', ['check', 'prepare'])
def test_killed_look_at_a_folder_goes_on(tmp_path, word):
    "What was seen of 2,400 pictures before the kill is not decoded again; the result is whole"
    import numpy as np, pandas as pd
    from fada.images import SEEN
    from PIL import Image

    (tmp_path / 'Femur').mkdir()
    rng = np.random.default_rng(0)
    for k in range(2400):
        Image.fromarray(rng.integers(0, 120, (160, 160), np.uint8)).save(tmp_path / 'Femur' / f'{k}.png')
    pd.DataFrame({'Image Name': [f'{k}.png' for k in range(2400)], 'Q6': 'good'}).to_csv(
        tmp_path / 'Femur' / 'a.csv', index=False
    )
    command = (
        typed('data check {tmp_path} --json', tmp_path=tmp_path)
        if word == 'check'
        else typed('prepare --data {data} --source folder --json', data=tmp_path)
    )
    env = dict(os.environ, FADA_QUIET='0')
    p = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env, start_new_session=True
    )
    _wait((tmp_path / SEEN).exists)
    os.killpg(p.pid, signal.SIGKILL)
    p.wait()
    done = len(pd.read_parquet(tmp_path / SEEN))
    assert 1000 <= done < 2400
    assert not (tmp_path / 'questions.parquet').exists()
    r = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert f'/{2400 - done} [' in r.stderr, r.stderr[-400:]  # the bar counts only what is left
    out = json.loads(r.stdout)
    assert (out['answers'] if word == 'check' else out['rows']) == 2400


def test_kernel_that_never_started_is_started_again(tmp_path, monkeypatch):
    "As when another notebook took its port: the first start fails before any cell ran, the second does the work"
    from fada.batch import Job, run_job
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook

    spec = tmp_path / 'jupyter' / 'kernels' / 'python3'
    spec.mkdir(parents=True)
    tries = tmp_path / 'tries'
    start = tmp_path / 'start.py'
    start.write_text(
        f"import pathlib, sys\nt = pathlib.Path({str(tries)!r})\nt.open('a').write('x')\n"
        "if len(t.read_text()) == 1: sys.exit(1)\n"
        "from ipykernel.kernelapp import launch_new_instance; launch_new_instance()\n"
    )
    argv = [sys.executable, str(start), '-f', '{connection_file}']
    (spec / 'kernel.json').write_text(json.dumps(dict(argv=argv, display_name='Python 3', language='python')))
    monkeypatch.setenv('JUPYTER_PATH', str(tmp_path / 'jupyter'))
    cells = [new_code_cell('a = 1', metadata=dict(tags=['parameters'])), new_code_cell('assert a == 2')]
    nb = new_notebook(
        cells=cells, metadata=dict(kernelspec=dict(name='python3', display_name='Python 3', language='python'))
    )
    nbformat.write(nb, tmp_path / 'n.ipynb')
    assert run_job(Job('two', tmp_path / 'n.ipynb', dict(a=2), tmp_path / 'two')).state == 'done'
    assert tries.read_text() == 'xx'
    wrong = run_job(Job('one', tmp_path / 'n.ipynb', dict(a=1), tmp_path / 'one'))  # its own fault: not tried again
    assert wrong.state == 'failed' and 'AssertionError' in wrong.reason and tries.read_text() == 'xxx'
