"""Batches: order, limits, retries, faults, other machines. The jobs are stubs that import nothing heavy, in real
kernels."""

import json, os, random, shutil, signal, subprocess, sys, threading, time
from pathlib import Path
import psutil
import pytest
from commands import typed
from fada import batch
from fada.batch import Job, run_jobs
from fada.settings import FadaError
from processes import below

STUB = '''from pathlib import Path
import json, os, time
if kill and batch > 8: os.kill(os.getpid(), 9)
once = Path(output)/"once"
if fall and not once.exists(): Path(output).mkdir(parents=True, exist_ok=True); once.touch(); os.kill(os.getpid(), 9)
if eat: held = bytearray(eat << 20); time.sleep(5)
out = Path(output); out.mkdir(parents=True, exist_ok=True); log = out/"answers.jsonl"
whole = [l for l in log.read_text().splitlines(True) if l.endswith("\\n")] if log.exists() else []
if whole: log.write_text("".join(whole))   # a torn last line is written again
done = len(whole)
with open(log, "a") as f:
    for k in range(done, n): f.write(json.dumps([name, k, batch])+"\\n"); f.flush(); time.sleep(pause)
if fail: raise ValueError("no such picture")
(out/"metrics.json").write_text(json.dumps([name, n]))'''


def stub(folder, name='stub'):
    "A run notebook that writes `n` answers, as slowly, as hungry or as faulty as it is told"
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook

    head = 'output = ""\nname = ""\nn = 3\npause = 0.0\nfail = False\nkill = False\nfall = False\neat = 0\nbatch = 16'
    nb = new_notebook(
        cells=[new_code_cell(head, metadata=dict(tags=['parameters'])), new_code_cell(STUB)],
        metadata=dict(kernelspec=dict(name='python3', display_name='Python 3', language='python')),
    )
    nbformat.write(nb, folder / f'{name}.ipynb')
    return folder / f'{name}.ipynb'


def job(tmp_path, name, after=(), notebook=None, **parameters):
    folder = tmp_path / 'out' / name
    limits = {k: parameters.pop(k) for k in ('seconds', 'limit', 'memory') if k in parameters}
    return Job(
        name,
        notebook or stub(tmp_path),
        dict(output=str(folder), name=name, **parameters),
        folder,
        outputs=[folder / 'metrics.json'],
        after=tuple(after),
        **limits,
    )


@pytest.fixture(autouse=True)
def runtime(tmp_path, monkeypatch):
    "Kernels name their connection file on the command line: below the test's own folder they can be found"
    monkeypatch.setenv('JUPYTER_RUNTIME_DIR', str(tmp_path / 'runtime'))


def by_state(results):
    return {r.job.name: r.state for r in results}


def test_order_failures_and_a_second_run(tmp_path):
    "What comes after a failed job is not run, all else is; the second run does what is missing, in no time"
    jobs = [
        job(tmp_path, 'b', ['a']),
        job(tmp_path, 'a'),
        job(tmp_path, 'bad', fail=True),
        job(tmp_path, 'c', ['bad']),
        job(tmp_path, 'd', ['c']),
    ]
    told = []
    results = run_jobs(jobs, 2, tell=lambda r: told.append(len(r)))
    assert by_state(results) == dict(a='done', b='done', bad='failed', c='not run', d='not run') and told[-1] == 5
    bad = results[2]
    assert 'no such picture' in bad.reason and 'bad.part' in bad.reason and not (tmp_path / 'out' / 'bad').exists()
    assert results[3].reason == 'bad: failed' and not list((tmp_path / 'out').glob('[ab].part'))
    start = time.perf_counter()
    again = by_state(run_jobs(jobs[:2], 2))
    assert set(again.values()) == {'reused'}
    assert time.perf_counter() - start < 2
    jobs[1].parameters['n'] = 5
    assert by_state(run_jobs(jobs[:2], 2)) == dict(a='done', b='reused')  # changed: done again, its answers kept
    assert len((tmp_path / 'out' / 'a' / 'answers.jsonl').read_text().splitlines()) == 5


def test_bad_batches_are_refused_before_any_job(tmp_path):
    a, b = job(tmp_path, 'a', ['b']), job(tmp_path, 'b', ['a'])
    for jobs, said in (
        ([a, b], 'wait for each other'),
        ([job(tmp_path, 'x', ['y'])], "comes after 'y'"),
        ([job(tmp_path, 'x'), job(tmp_path, 'x')], 'two jobs are called'),
        ([job(tmp_path, 'x', nn=3)], 'unknown parameter .nn.'),
    ):
        with pytest.raises(FadaError, match=said):
            run_jobs(jobs)
    assert not (tmp_path / 'out').exists()


def test_limits_of_time_and_memory(tmp_path):
    """A job that hangs and one that eats memory end with the reason; the next is not kept waiting; nothing is left
    running"""
    jobs = [
        job(tmp_path, 'slow', pause=60.0, seconds=6),
        job(tmp_path, 'hungry', eat=700, limit=600 << 20),
        job(tmp_path, 'good'),
    ]
    r = {x.job.name: x for x in run_jobs(jobs, 2)}
    assert (
        'longer than 6 s' in r['slow'].reason
        and 'GiB of main memory' in r['hungry'].reason
        and r['good'].state == 'done'
    )
    time.sleep(1.5)
    assert not below(tmp_path)


@pytest.mark.fault
def test_what_hangs_and_what_changes_meanwhile(tmp_path, monkeypatch):
    """A stopped process that does not hear the order to end is killed; a table that changes during a run fails it;
    force begins anew"""
    monkeypatch.setattr(batch, 'PATIENCE', 1.0)
    j = job(tmp_path, 'deaf', pause=60.0, seconds=8)
    told = threading.Event()

    def deafen():
        while not told.wait(0.2):
            for c in psutil.Process().children():
                if 'fada.batch' in c.cmdline() and (j.part / 'answers.jsonl').exists():
                    c.suspend()
                    return

    t = threading.Thread(target=deafen)
    t.start()
    r = run_jobs([j])[0]
    told.set()
    t.join()
    assert r.state == 'failed' and 'longer than 8 s' in r.reason and not below(tmp_path)
    table = tmp_path / 'table'
    table.write_text('1')
    j = job(tmp_path, 'a', n=20, pause=0.1)
    j.inputs = [table]
    change = threading.Timer(4, lambda: table.write_text('2'))
    change.start()
    r = run_jobs([j])[0]
    change.join()
    if r.state == 'failed':
        assert 'changed while it ran' in r.reason
        r = run_jobs([j])[0]  # else it was done before the change
    assert r.state in ('done', 'reused')
    log = tmp_path / 'out' / 'a' / 'answers.jsonl'
    log.write_text('["old", 0, 0]\n')
    j.parameters['n'] = 2
    run_jobs([j])
    assert 'old' in log.read_text()  # other settings: the answers are kept, and what they depend on is in them
    j.fresh = True
    assert run_jobs([j])[0].state == 'done' and 'old' not in log.read_text()
    assert [p.name for p in (tmp_path / 'out').iterdir() if p.name.endswith(('.old', '.part'))] == ['deaf.part']


@pytest.mark.fault
def test_a_killed_kernel_gets_half_the_batch(tmp_path):
    """Exit 138 is what a machine out of memory looks like: a kernel that dies again as it was gets half, and the
    record says so"""
    r = run_jobs([job(tmp_path, 'a', kill=True)])[0]
    assert (
        r.state == 'done'
        and r.retried
        and json.loads((tmp_path / 'out' / 'a' / 'answers.jsonl').read_text().splitlines()[0])[2] == 8
    )
    assert json.loads((tmp_path / 'out' / 'a' / 'done.json').read_text())['retried']
    r = run_jobs([job(tmp_path, 'b', kill=True, batch=64)])[0]
    assert r.state == 'failed' and '(exit 138' in r.reason and r.retried


@pytest.mark.fault
def test_a_kernel_killed_by_somebody_goes_on_as_it_was(tmp_path, monkeypatch):
    """Where the system killed nothing for want of memory the batch stays whole, and so do the bytes; where it did,
    half at once"""
    r = run_jobs([job(tmp_path, 'a', fall=True)])[0]
    rows = lambda k: [json.loads(l) for l in (tmp_path / 'out' / k / 'answers.jsonl').read_text().splitlines()]
    assert r.state == 'done' and not r.retried and rows('a') == [['a', k, 16] for k in range(3)]
    counted = iter(range(9))
    monkeypatch.setattr(batch, '_memory_kills', lambda: next(counted))
    r = run_jobs([job(tmp_path, 'b', kill=True)])[0]
    assert r.state == 'done' and r.retried and rows('b')[0][2] == 8 and next(counted) == 3


def test_a_group_ends_with_what_it_started(tmp_path):
    code = (
        'import subprocess, sys\nfrom fada.batch import end_group\n'
        'p = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]); print(p.pid, flush=True)\n'
        'end_group(); print("still here")'
    )
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
    assert r.returncode == 128 + signal.SIGTERM and r.stdout.strip().isdigit(), (r.returncode, r.stdout, r.stderr)
    child = int(r.stdout)
    end = time.monotonic() + 10
    gone = lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    while not gone() and time.monotonic() < end:
        time.sleep(0.05)
    assert gone()


@pytest.mark.slow
@pytest.mark.parametrize('stop,second', [(batch.stop_running, 'done'), (batch.end_jobs, 'cancelled')])
def test_what_runs_is_ended_and_what_waits_goes_on_or_not(tmp_path, stop, second):
    jobs = [job(tmp_path, 'a', n=1000, pause=0.1), job(tmp_path, 'b', n=1)]
    found = []
    t = threading.Thread(target=lambda: found.extend(run_jobs(jobs, 1)))
    t.start()
    end = time.monotonic() + 60
    log = jobs[0].part / 'answers.jsonl'
    log2 = jobs[0].folder / 'answers.jsonl'
    while not (log.exists() or log2.exists()) and time.monotonic() < end:
        time.sleep(0.05)
    stop()
    t.join(60)
    assert not t.is_alive() and not below(tmp_path)
    states = by_state(found)
    assert states['a'] != 'done' and states['b'] == second, states


def test_a_heartbeat_says_the_bars_of_what_runs_and_ends_with_its_work(tmp_path):
    jobs = [job(tmp_path, k) for k in 'ab']
    said = []
    jobs[0].folder.mkdir(parents=True)
    jobs[1].part.mkdir(parents=True)
    (jobs[1].part / 'run.log').write_text('begin\n 10%|#   | 1/10\r 20%|##  | 2/10')
    assert batch.heartbeat(lambda: time.sleep(0.5) or 'its result', jobs, said.append, 0.1) == 'its result'
    assert said[:2] == ['  1 of 2 done', '  b: 20%|##  | 2/10']
    n = len(said)
    time.sleep(0.3)
    assert len(said) == n
    with pytest.raises(ZeroDivisionError):
        batch.heartbeat(lambda: 1 / 0, jobs, said.append, 0.1)


def test_processes_take_slots(tmp_path):
    "A job of two processes runs alone on two slots; one of three never will"
    jobs = [job(tmp_path, k, pause=0.3) for k in 'abc']
    jobs[1].slots = 2
    jobs[2].slots = 3
    r = {x.job.name: x for x in run_jobs(jobs, 2)}
    assert r['a'].state == r['b'].state == 'done' and r['a'].started + r['a'].seconds <= r['b'].started + 0.1
    assert r['c'].state == 'not run' and '3 processes, there are 2 slots' in r['c'].reason


def test_memory_decides_how_many_run_together(tmp_path):
    "Two of 3 GiB do not go into 5; one of 6 never will"
    jobs = [job(tmp_path, k, memory=m << 30, pause=0.4) for k, m in dict(a=3, b=3, c=6, d=1).items()]
    r = {x.job.name: x for x in run_jobs(jobs, 4, memory=5 << 30)}
    span = lambda k: (r[k].started, r[k].started + r[k].seconds)
    (a0, a1), (b0, b1) = span('a'), span('b')
    assert a1 <= b0 + 0.1 or b1 <= a0 + 0.1
    assert r['c'].state == 'not run' and '6.0 GiB' in r['c'].reason and r['d'].state == 'done'


DRIVER = '''import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_batch import job, by_state
from fada.batch import run_jobs
d = Path(sys.argv[1]); jobs = [job(d, f"j{k}", [f"j{k-2}"] if k > 1 else (), d/"stub.ipynb", n=12, pause=.05) for k in range(4)]
print(json.dumps(by_state(run_jobs(jobs, 2))))'''


def drive(tmp_path, **kw):
    return subprocess.Popen(
        [sys.executable, '-c', DRIVER, str(tmp_path), str(Path(__file__).parent)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **kw,
    )


@pytest.mark.fault
@pytest.mark.parametrize('seed', range(3))  # bench/batch.py goes over twenty, with true trainings
def test_killed_anywhere_and_run_again(tmp_path, seed):
    """SIGKILL the whole batch, the process of a notebook or its kernel, at a random moment: the next run ends as an
    unbroken one"""
    rng = random.Random(seed)
    stub(tmp_path)
    p = drive(tmp_path)
    time.sleep(rng.uniform(1, 7))
    victim = ['batch', 'notebook', 'kernel'][seed % 3]
    killed = False
    while not killed and p.poll() is None:  # the one that was there may just have ended
        children = psutil.Process(p.pid).children(recursive=True)
        try:
            of = dict(
                batch=[psutil.Process(p.pid)],
                notebook=[c for c in children if 'fada.batch' in c.cmdline()],
                kernel=[c for c in children if 'ipykernel_launcher' in c.cmdline()],
            )
            if of[victim]:
                of[victim][0].kill()
                killed = True
        except psutil.NoSuchProcess:
            pass
    assert killed
    out, err = p.communicate(timeout=120)
    if victim == 'batch':  # its children notice
        gone, alive = psutil.wait_procs(children, timeout=10)
        assert not alive
    r = drive(tmp_path)
    out, err = r.communicate(timeout=180)
    assert r.returncode == 0, err
    assert set(json.loads(out).values()) <= {'done', 'reused'}
    for k in range(4):
        rows = [json.loads(l) for l in (tmp_path / 'out' / f'j{k}' / 'answers.jsonl').read_text().splitlines()]
        assert [x[:2] for x in rows] == [[f'j{k}', i] for i in range(12)]
    assert not list((tmp_path / 'out').glob('*.part'))
    time.sleep(1)
    assert not below(tmp_path)


@pytest.mark.fault
def test_a_full_disk_fails_the_job_and_loses_nothing(tmp_path):
    "A small file system runs full: the job says so, and is finished when there is room"
    disk = tmp_path / 'disk'
    disk.mkdir()
    if subprocess.run(
        ['mount', '-t', 'tmpfs', '-o', 'size=300k', 'tmpfs', str(disk)], capture_output=True
    ).returncode:
        pytest.skip('no right to mount')
    try:
        (disk / 'filler').write_bytes(b'x' * 270_000)
        nb = stub(tmp_path)
        j = job(disk, 'a', notebook=nb, n=4000)
        r = run_jobs([j])[0]
        assert r.state == 'failed' and ('No space left' in r.reason or 'Errno 28' in r.reason)
        (disk / 'filler').unlink()
        assert run_jobs([j])[0].state == 'done'
        rows = [json.loads(l) for l in (disk / 'out' / 'a' / 'answers.jsonl').read_text().splitlines()]
        assert [x[1] for x in rows] == list(range(4000))
    finally:
        subprocess.run(['umount', str(disk)], check=True)


# ---- other machines


@pytest.fixture
def cluster(tmp_path):
    "A Dask scheduler and two workers, each a process of its own, joined by address"
    env = dict(os.environ, PYTHONPATH=str(Path(__file__).parent))
    procs, name = [], tmp_path / 'scheduler.json'
    start = lambda *words: (
        procs.append(
            subprocess.Popen(
                [sys.executable, '-m', *words],
                env=env,
                cwd=tmp_path,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        )
        or procs[-1]
    )
    start(
        'distributed.cli.dask_scheduler',
        '--host',
        '127.0.0.1',
        '--port',
        '0',
        '--dashboard-address',
        ':0',
        '--scheduler-file',
        str(name),
    )
    workers = [
        start(
            'distributed.cli.dask_worker',
            '--scheduler-file',
            str(name),
            '--nthreads',
            '1',
            '--no-nanny',
            '--name',
            f'w{k}',
            '--local-directory',
            str(tmp_path / f'w{k}'),
            '--no-dashboard',
        )
        for k in range(2)
    ]
    for _ in range(600):
        if name.exists():
            break
        time.sleep(0.1)
    address = json.loads(name.read_text())['address']
    from distributed import Client

    with Client(address, set_as_default=False) as c:
        c.wait_for_workers(2, timeout=60)
    yield address, workers, procs
    for p in procs:
        if p.poll() is None:
            os.killpg(p.pid, signal.SIGKILL)
            p.wait()


@pytest.mark.fault
def test_a_worker_taken_away_and_its_jobs_run_elsewhere(tmp_path, cluster):
    from fada.cluster import joined

    address, workers, procs = cluster
    nb = stub(tmp_path)
    said = []
    jobs = [job(tmp_path, f'j{k}', notebook=nb, n=60, pause=0.05) for k in range(4)]

    def take_away(results):
        if len(results) == 1:
            os.killpg(workers[0].pid, signal.SIGKILL)

    with joined(address, said.append, folder=tmp_path, patience=1.0) as c:
        assert c.slots == 2 and c.memory > 0 and 'dashboard http' in said[0]
        results = run_jobs(jobs, c.slots, executor=c.executor, tell=take_away, look=c.look)
        assert any('gone, 1 workers left: their jobs run elsewhere' in l for l in said)
        os.killpg(workers[1].pid, signal.SIGKILL)
        end = time.monotonic() + 60  # the last one: nobody would ever run what is left
        with pytest.raises(FadaError, match='no worker is left in tcp.*what is done is kept'):
            while time.monotonic() < end:
                c.look()
                time.sleep(0.2)
    assert by_state(results) == {f'j{k}': 'done' for k in range(4)}
    for k in range(4):
        rows = [json.loads(l)[1] for l in (tmp_path / 'out' / f'j{k}' / 'answers.jsonl').read_text().splitlines()]
        assert rows == list(range(60))


@pytest.mark.fault
def test_a_cluster_that_cannot_be_used_is_named(tmp_path, cluster, monkeypatch):
    from fada import cluster as c

    with pytest.raises(FadaError, match='does not answer'):
        with c.joined('tcp://127.0.0.1:9', timeout=1):
            pass
    stamp = c._stamp
    monkeypatch.setattr(c, '_stamp', lambda: dict(stamp(), torch='0.0.1'))
    monkeypatch.setattr('distributed.Client.run', lambda self, f, **kw: {'tcp://w:1': stamp(), 'tcp://w:2': stamp()})
    with pytest.raises(
        FadaError, match=r'2 of 2 workers run another version of FADA.*tcp://w:1.*torch .* \(here 0.0.1\)'
    ):
        with c.joined(cluster[0], lambda line: None):
            pass


@pytest.mark.fault
def test_the_scheduler_of_settings_ini_and_a_worker_without_fada(tmp_path, root, small_data, cluster, monkeypatch):
    """An address in settings.ini is used like --scheduler, which wins over it; a worker on which FADA is not
    installed is a sentence"""
    from distributed import Client
    from fada.cluster import cluster_of
    from fada.grid import run_grid
    from fada.settings import load_settings

    address, _, procs = cluster
    (tmp_path / 'settings.ini').write_text(f'[cluster]\nscheduler = {address}\n')
    monkeypatch.chdir(tmp_path)
    said = []
    with cluster_of(load_settings(), say=said.append, folder=tmp_path) as c:
        assert (
            c.slots == 2
            and run_jobs([job(tmp_path, 'a')], c.slots, executor=c.executor, look=c.look)[0].state == 'done'
        )
    assert said[0].startswith('2 workers, 2 slots') and not list(tmp_path.glob('.seen*'))
    (tmp_path / 'nbs').symlink_to(root / 'nbs')
    g = tmp_path / 'g.toml'
    g.write_text(
        f'models = ["blip2-nano"]\ncategories = ["Femur"]\nprecisions = ["fp32"]\nseeds = [0]\ndata = "{small_data}"\n'
    )
    with pytest.raises(FadaError, match='does not answer in host:none'):
        run_grid(g, tmp_path / 'o', scheduler='host:none', say=said.append)
    assert not [p for p in (tmp_path / 'o').iterdir() if p.is_dir()]
    bare = 'import sys; sys.modules["fada"] = None; from distributed.cli.dask_worker import main; main()'
    procs.append(
        subprocess.Popen(
            [
                sys.executable,
                '-c',
                bare,
                address,
                '--no-nanny',
                '--no-dashboard',
                '--local-directory',
                str(tmp_path / 'bare'),
            ],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    )
    with Client(address, set_as_default=False) as c:
        c.wait_for_workers(3, timeout=60)
    with (
        pytest.raises(FadaError, match="1 of 3 workers cannot run FADA in tcp.*No module named 'fada"),
        cluster_of(load_settings(), say=said.append),
    ):
        pass


@pytest.mark.fault
def test_the_scheduler_killed_and_all_done_by_the_next_run(tmp_path, cluster):
    """SIGKILL of the scheduler ends the batch with one sentence and every process with it; the next run, here, goes
    on where it ended"""
    from fada.cluster import joined

    address, workers, procs = cluster
    nb = stub(tmp_path)
    jobs = [job(tmp_path, f'j{k}', notebook=nb, n=100, pause=0.05) for k in range(4)]
    for j in jobs:
        j.stop = tmp_path / 'stop'

    def kill():
        while not any((j.part / 'answers.jsonl').exists() for j in jobs):
            time.sleep(0.1)
        procs[0].kill()

    t = threading.Thread(target=kill)
    t.start()
    with pytest.raises(FadaError, match='the scheduler is gone in tcp.*what is done is kept'):
        with joined(address, lambda line: None) as c:
            run_jobs(jobs, c.slots, executor=c.executor, look=c.look)
    t.join()
    end = time.monotonic() + 30
    while any('ipykernel_launcher' in p.cmdline() for p in below(tmp_path)) and time.monotonic() < end:
        time.sleep(0.2)
    assert time.monotonic() < end
    begun = sum((j.part / 'answers.jsonl').exists() for j in jobs)
    assert begun
    (tmp_path / 'stop').unlink()
    assert set(by_state(run_jobs(jobs, 2)).values()) <= {'done', 'reused'}  # one may just have ended
    for j in jobs:
        assert [json.loads(l)[1] for l in (j.folder / 'answers.jsonl').read_text().splitlines()] == list(range(100))


# ---- from a grid file


@pytest.mark.slow
def test_grid_by_command(tmp_path, root, small_data):
    """Two trainings and what comes after them; the second run does nothing; a dry run starts nothing; a bad grid is
    one sentence"""
    grid = tmp_path / 'night.toml'
    out = tmp_path / 'o'
    grid.write_text(
        f'categories = ["Femur"]\ndata = "{small_data}"\ntasks = ["baseline", "train", "evaluate"]\n'
        '[parameters.train]\nsteps = 2\nbatch = 4\nimages = 6\n[parameters.evaluate]\nimages = 3\ncontrol_images = 2\n'
    )
    fada = lambda *w: subprocess.run(
        [*typed('batch {grid} --out {out} --quiet', grid=grid, out=out), *w],
        cwd=root,
        capture_output=True,
        text=True,
    )
    plan = json.loads(fada('--dry-run', '--json').stdout)
    assert [p['state'] for p in plan['jobs']] == ['to do'] * 3
    assert (
        all(p['memory_gib'] > 0.5 for p in plan['jobs'])
        and plan['totals']['to_do'] == 3
        and plan['totals']['together_gib'] > 1
    )
    assert not out.exists()
    r = fada('--json')
    assert r.returncode == 0, r.stderr
    about = json.loads(r.stdout)
    assert (
        about['states'] == dict(done=3)
        and (out / 'batch.png').stat().st_size > 5000
        and json.loads((out / 'batch.json').read_text())['jobs'] == 3
    )
    start = time.perf_counter()
    again = json.loads(fada('--json').stdout)
    assert again['states'] == dict(reused=3) and time.perf_counter() - start < 30
    assert json.loads((out / 'evaluate-blip2-nano-Femur-fp32-0' / 'metrics.json').read_text())['images'] == 3
    grid.write_text('modles = ["x"]')
    r = fada()
    assert r.returncode == 1 and 'one of models' in r.stderr and 'Traceback' not in r.stderr


def test_memory_where_no_plan_can_be_made(tmp_path, root, monkeypatch):
    """A service takes a process and nothing of a card, an ensemble what its parts take; a shape that is not known
    is said to be so"""
    from dataclasses import replace
    from fada.grid import BESIDE, Job, grid_table, model_memory, plan_jobs
    from fada.registry import MODELS

    monkeypatch.setitem(MODELS, 'strange', replace(MODELS['llava-1.5-7b'], name='strange'))
    monkeypatch.setitem(
        MODELS, 'two', replace(MODELS['ensemble'], name='two', parts=(('blip2-nano', 1), ('openai', 2)))
    )
    jobs = [
        Job(m, root / 'nbs' / 'run' / 'evaluate.ipynb', dict(model=m, precision='fp32'), tmp_path / m)
        for m in ('blip2-nano', 'openai', 'strange', 'two')
    ]
    t = grid_table(jobs, plan_jobs(jobs))
    nano, service, strange, two = (j.memory for j in jobs)
    assert (
        service == BESIDE < nano == two
        and strange == 0
        and not jobs[2].known
        and t.memory_gib.isna().tolist() == [False, False, True, False]
        and t.memory_gib[1] == round(BESIDE / 2**30, 2)
    )
    assert model_memory('openai', 'answer', 'fp32', 'cuda') == (0, None, 0) and model_memory(
        'strange', 'answer', 'bf16', 'cuda'
    ) == (None, None, 0)


@pytest.mark.parametrize(
    'more,said',
    [
        ('[[exclude]]\ncategory = "Abdomen"', 'fits no job'),
        ('[[include]]\ntask = "train"', 'unknown key .task.'),
        ('[[include]]\nmodel = "openai"', 'openai cannot do train'),
        ('exclude = 3', 'a list'),
        ('limits = 3', 'a table'),
        ('parameters = 3', 'a table'),
        ('name = 3', 'a text'),
        ('tasks = ["evaluate"]', 'needs train-blip2-nano'),
        ('modles = ["x"]', 'unknown key .modles.*one of models'),
        ('[[include]]\nmodel = "blip2-nanno"', 'blip2-nanno'),
        ('[[exclude]]\nmodel = "blip2-nano"', 'expands to no job'),
        ('[limits]\njobs = 1', 'expands to 2 jobs.*at most 1'),
        ('[limits]\nslot = 1', 'unknown key .slot.'),
        ('[parameters.trian]\nsteps = 3', 'unknown key .trian.'),
        ('[parameters.train]\nstepz = 3', 'unknown parameter .stepz.*steps'),
        ('[parameters.train]\nsteps = "3"', 'is str.*int'),
        ('[parameters.train]\nseed = 3', '.seed. is set by the grid itself'),
        ('shards = 0', 'at least 1'),
        ('shards = "2"', 'at least 1'),
        ('processes = 1.5', 'at least 1'),
        ('shards = true', 'at least 1'),
    ],
)
def test_a_grid_that_cannot_be_meant(tmp_path, root, more, said):
    from fada.grid import grid_jobs, read_grid

    (tmp_path / 'nbs').symlink_to(root / 'nbs')
    g = tmp_path / 'g.toml'
    g.write_text('models = ["blip2-nano"]\ncategories = ["Femur"]\nprecisions = ["fp32"]\nseeds = [0]\n' + more)
    with pytest.raises(FadaError, match=said):
        grid_jobs(read_grid(g), tmp_path / 'o')


def test_bad_input_is_named_before_any_job(tmp_path, root):
    "By the call that runs a grid: one sentence, and no job has a folder"
    from fada.grid import run_grid

    (tmp_path / 'nbs').symlink_to(root / 'nbs')
    g = tmp_path / 'g.toml'
    plain = 'models = ["blip2-nano"]\ncategories = ["Femur"]\nprecisions = ["fp32"]\nseeds = [0]\n'
    for more, said in (
        ('modles = ["x"]\n', 'unknown key'),
        ('[[include]]\nmodel = "x"', 'unknown model'),
        ('[[exclude]]\nseed = 0', 'no job'),
        ('[limits]\njobs = 1', 'at most 1'),
        ('[parameters.evaluate]\nimagse = 3', 'unknown parameter'),
    ):
        g.write_text(plain + more)
        with pytest.raises(FadaError, match=said):
            run_grid(g, tmp_path / 'o', say=lambda line: None)
    assert not [p for p in (tmp_path / 'o').iterdir() if p.is_dir()]


def test_a_category_is_excluded_however_it_is_spelt(tmp_path, root):
    from fada.grid import grid_jobs, read_grid

    (tmp_path / 'nbs').symlink_to(root / 'nbs')
    g = tmp_path / 'g.toml'
    g.write_text(
        'models = ["blip2-nano"]\ncategories = ["Femur", "Thorax"]\nprecisions = ["fp32"]\nseeds = [0]\n[[exclude]]\ncategory = "femur"\n'
    )
    assert {j.parameters['categories'] for j in grid_jobs(read_grid(g), tmp_path / 'o')} == {'Thorax'}


def test_shards_and_processes_of_a_grid(tmp_path, root):
    """Each evaluation becomes its parts and their merge; a training takes as many slots as processes, if its
    notebook knows of them"""
    import nbformat
    from fada.batch import check_parameters
    from fada.grid import chosen, grid_jobs, plan_jobs, read_grid

    shutil.copytree(root / 'nbs' / 'run', tmp_path / 'nbs' / 'run')
    train = tmp_path / 'nbs' / 'run' / 'train.ipynb'
    g = tmp_path / 'g.toml'
    nb = nbformat.read(train, 4)
    head = next(c for c in nb.cells if 'parameters' in c.metadata.get('tags', ()))
    if 'processes' not in head.source:
        head.source += '\nprocesses = 1'
        nbformat.write(nb, train)
    g.write_text(
        'models = ["blip2-nano"]\ncategories = ["Femur"]\nprecisions = ["fp32"]\nseeds = [0]\nshards = 2\nprocesses = 2\n'
    )
    jobs = grid_jobs(read_grid(g), tmp_path / 'o')
    plan_jobs(jobs)
    lora, one, two, whole = jobs
    for j in jobs:
        check_parameters(j.notebook, j.parameters)
    assert (lora.slots, lora.parameters['processes'], one.slots) == (
        2,
        2,
        1,
    ) and lora.memory > one.memory > whole.memory == 0
    assert (
        [one.parameters['shard'], two.parameters['shard']] == ['1/2', '2/2']
        and 'part1of2' in one.name
        and two.after == (lora.name,)
    )
    assert whole.name == 'evaluate-blip2-nano-Femur-fp32-0' and whole.parameters['shards'] == [
        str(one.folder),
        str(two.folder),
    ]
    assert whole.after == (lora.name, one.name, two.name) and two.folder / 'answers.jsonl' in whole.inputs
    assert [j.name for j in chosen(jobs, whole.name)] == [j.name for j in jobs]


def test_a_script_for_nodes_says_what_the_notebook_would_be_told(root):
    """Each parameter of the training notebook is an option of `fada train`, so that none is lost on the way into
    the script"""
    from typer.main import get_command
    from fada.batch import notebook_parameters
    from fada.cli import app
    from fada.cluster import _words

    options = {o for p in get_command(app).commands['train'].params for o in p.opts}
    base = ('vision_steps', 'answer_steps')  # of the embedded base, which one process trains
    told = set(_words({k: True for k in notebook_parameters(root / 'nbs' / 'run' / 'train.ipynb') if k not in base}))
    assert told <= options, told - options


def test_settings_that_decide_a_result_change_the_job(tmp_path, root, monkeypatch):
    "Another balance trains anew, another sentence model scores anew; a seed of 0 is a seed"
    from fada.cluster import _words
    from fada.grid import grid_jobs, read_grid

    (tmp_path / 'nbs').symlink_to(root / 'nbs')
    g = tmp_path / 'g.toml'
    monkeypatch.chdir(tmp_path)
    g.write_text(
        'models = ["blip2-nano"]\ncategories = ["Femur"]\nprecisions = ["fp32"]\nseeds = [0]\ntasks = ["train", "evaluate"]'
    )

    def digests(ini):
        (tmp_path / 'settings.ini').write_text(ini)
        return [j.digest() for j in grid_jobs(read_grid(g), tmp_path / 'o')]

    plain, loss = digests('[train]\nbalance = draw\n'), digests('[train]\nbalance = loss\n')
    assert plain[0] != loss[0] and plain[1] == loss[1]
    assert digests(f'[scores]\nsentence_model = {tmp_path}\n')[1] != plain[1]
    assert _words(dict(seed=0, patience=0, rank=0, steps=3, augment=False)) == [
        '--seed',
        '0',
        '--patience',
        '0',
        '--steps',
        '3',
    ]


def test_clusters_that_are_not_here_are_named(monkeypatch, tmp_path):
    """No Slurm, no way to a machine: a sentence before anything is started; a scheduler's slots and executor make a
    `Joined`"""
    from fada.cluster import Joined, cluster_of, slurm_workers, ssh_workers
    from fada.settings import load_settings

    monkeypatch.setenv('PATH', str(tmp_path))
    for there in (
        lambda: slurm_workers(load_settings(), print),
        lambda: cluster_of(load_settings(cluster_jobqueue='slurm')),
    ):
        with pytest.raises(FadaError, match='Slurm is not here.*login node'), there():
            pass
    with pytest.raises(FadaError, match='gpu1 cannot be reached by ssh .*no command nossh'):
        with ssh_workers(load_settings(cluster_hosts='gpu1', cluster_ssh='nossh'), print):
            pass
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(2) as pool:  # what `run_jobs` takes of it, with any executor
        there = Joined(2, pool, 0, lambda: None)
        assert there.threads == 0 and by_state(
            run_jobs([job(tmp_path, 'a', n=1)], there.slots, executor=there.executor, look=there.look)
        ) == dict(a='done')


@pytest.mark.slow
def test_a_demonstration_stops_at_a_failed_job_and_names_it(tmp_path, monkeypatch):
    "The stage after it is not begun, and what is done is kept"
    from fada import demo

    first, later = [job(tmp_path, 'a', n=1), job(tmp_path, 'b', n=1, fail=True)], [job(tmp_path, 'c', n=1)]
    said = []
    monkeypatch.setattr(demo, 'demo_stages', lambda *a: iter([('first', first), ('later', later)]))
    with pytest.raises(FadaError, match='b failed.*no such picture.*what is done is kept'):
        demo.run_demo(tmp_path / 'demo', tmp_path / 'data', small=True, say=said.append)
    assert (tmp_path / 'out' / 'a' / 'metrics.json').is_file() and not later[0].folder.exists()
    assert any('first (2 jobs)' in l for l in said) and not any('later' in l for l in said)
