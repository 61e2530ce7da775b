"""What a batch costs beside its jobs, and what becomes of it when something breaks.

`overhead`: wall time of 40 nano trainings on two slots against the jobs' own seconds divided by the slots (at most
1.15), and the time of a second run that finds all done (at most 5 s). `faults`: 20 seeded rounds, two with true
trainings, the others with jobs that import nothing heavy: SIGKILL at a random moment of the batch, a notebook's
process, a kernel, a worker or the scheduler; a disk that runs full (a small tmpfs), a job that hangs, one that
fails. After each the next run ends as an undisturbed one, byte for byte; what was done before is not done again,
and nothing is left running. Each part takes under 12 minutes on two cores: no round begins after `--seconds`.

Writes bench/results/batch-<part>-<processor>.json unless --quick.

    python bench/batch.py --json
    python bench/batch.py --only overhead --json
"""

import argparse, json, os, platform, random, re, signal, subprocess, sys, tempfile, time
from contextlib import contextmanager, nullcontext
from pathlib import Path
import psutil
from fada.settings import environment, write_json

sys.path.insert(0, str(Path(__file__).parents[1] / 'tests'))
from processes import below

GRID = '''data = "{data}"
categories = ["Femur", "Abdomen"]
seeds = {seeds}
tasks = ["train"]
[parameters.train]
steps = 2
batch = 4
images = 6
[limits]
slots = 2
memory = "64GiB"
'''

LONGEST = 600.0  # seconds that one run of a batch may take here


def order(grid, out):
    return [sys.executable, '-m', 'fada.cli', 'batch', str(grid), '--out', str(out), '--quiet', '--json']


def batch(grid, out, **kw):
    "(record, seconds of the command) of one run"
    start = time.perf_counter()
    r = subprocess.run(order(grid, out), capture_output=True, text=True, timeout=LONGEST, **kw)
    assert r.returncode == 0, r.stderr
    return json.loads(r.stdout), time.perf_counter() - start


# ---- what a round proves


def quiet(words, **kw):
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, **kw)


def findable(d):
    return dict(
        os.environ, JUPYTER_RUNTIME_DIR=str(d / 'runtime')
    )  # a kernel has the path of its connection file on its command line


def nothing_left(d, seconds=20.0):
    "Prove that no process has to do with a folder any more, or has not for long"
    end = time.monotonic() + seconds
    while (left := below(d)) and time.monotonic() < end:
        time.sleep(0.2)
    assert not left, f'{d.name}: left running {[p.cmdline()[:4] for p in left]}'


def done(out):
    return {p: p.stat().st_mtime_ns for p in Path(out).glob('*/done.json')}


def weights(out):
    return {p.parent.parent.name: p.read_bytes() for p in Path(out).glob('*/adapter/adapter_model.safetensors')}


def training_round(d, seed, grid, whole):
    """Kill a kernel, or the whole batch, at a random moment of true trainings, run again, compare the adapters byte
    for byte; what was killed"""
    rng = random.Random(seed)
    home = d / f'r{seed}'
    out = home / 'out'
    home.mkdir()
    what = ('kernel', 'batch')[seed % 2]
    p = quiet(order(grid, out), env=findable(home))
    there = kill_one(what, p, {}, rng.uniform(8, 20))
    p.wait(LONGEST)
    before = done(out)
    batch(grid, out, env=findable(home))
    assert weights(out) == whole, f'round {seed}, {what}: other weights'
    assert before.items() <= done(out).items(), f'round {seed}, {what}: what was done was done again'
    nothing_left(home)
    return f'training: {what}' if there else f'training: {what}: too late'


# ---- rounds with jobs that import nothing heavy: the same batch, many more moments

STUB = '''from pathlib import Path
import hashlib, time
out = Path(output); out.mkdir(parents=True, exist_ok=True); log = out/"answers.jsonl"
whole = [l for l in log.read_text().splitlines(True) if l.endswith("\\n")] if log.exists() else []
if whole: log.write_text("".join(whole))   # a torn last line is written again
with open(log, "a") as f:
    for k in range(len(whole), 12):
        if k == 6 and name == "j1" and (out.parent.parent/"hanging").exists(): time.sleep(3600)
        if k == 6 and name == "j1" and (out.parent.parent/"failing").exists(): raise ValueError("no such picture")
        f.write(f"{name} {k}\\n"); f.flush(); time.sleep(.05)
(out/"weights").write_bytes(hashlib.sha256(log.read_bytes()).digest()*1000)'''

DRIVER = '''import sys
from contextlib import nullcontext
from pathlib import Path
from fada.batch import Job, run_jobs
d, out, address = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
job = lambda k: Job(f"j{k}", d/"stub.ipynb", dict(output=str(out/f"j{k}"), name=f"j{k}"), out/f"j{k}", outputs=[out/f"j{k}"/"weights"],
                    after=(f"j{k-2}",) if k > 1 else (), stop=out/"stop", seconds=10 if k == 1 and (out.parent/"hanging").exists() else 0)
jobs = [job(k) for k in range(4)]; out.mkdir(exist_ok=True); (out/"stop").unlink(missing_ok=True)
if address:
    from fada.cluster import joined
    with joined(address[0], lambda line: None) as c: r = run_jobs(jobs, c.slots, executor=c.executor, look=c.look)
else: r = run_jobs(jobs, 2)
sys.exit(0 if {x.state for x in r} <= {"done", "reused"} else 1)'''


def drive(d, out, *address):
    return quiet([sys.executable, '-c', DRIVER, str(d), str(out), *address], env=findable(out.parent))


def results(out):
    assert not list(out.glob('*.part')), f'{out}: unfinished'
    return {
        p.relative_to(out).as_posix(): p.read_bytes()
        for k in range(4)
        for p in (out / f'j{k}' / 'answers.jsonl', out / f'j{k}' / 'weights')
    }


@contextmanager
def cluster(d):
    "(address, {scheduler, worker: process}) of a Dask scheduler with two workers"
    at, procs = d / 'scheduler.json', {}
    start = lambda name, *words: procs.setdefault(name, quiet([sys.executable, '-m', *words], cwd=d, env=findable(d)))
    start(
        'scheduler',
        'distributed.cli.dask_scheduler',
        '--host',
        '127.0.0.1',
        '--port',
        '0',
        '--no-dashboard',
        '--scheduler-file',
        str(at),
    )
    for n in ('worker', 'other'):
        start(
            n,
            'distributed.cli.dask_worker',
            '--scheduler-file',
            str(at),
            '--nthreads',
            '1',
            '--no-nanny',
            '--no-dashboard',
            '--local-directory',
            str(d / n),
        )
    while not at.exists():
        time.sleep(0.1)
    from distributed import Client

    address = json.loads(at.read_text())['address']
    with Client(address, set_as_default=False) as c:
        c.wait_for_workers(2, timeout=120)
    try:
        yield address, procs
    finally:
        for p in procs.values():
            if p.poll() is None:
                os.killpg(p.pid, signal.SIGKILL)
            p.wait()


def _victim(what, p):
    "A process of the batch `p` that is a notebook's or a kernel, or the batch itself; None where there is none now"
    if what == 'batch':
        return psutil.Process(p.pid)
    mark = {'notebook': 'fada.batch', 'kernel': 'ipykernel_launcher'}[what]
    return next((c for c in psutil.Process(p.pid).children(recursive=True) if mark in c.cmdline()), None)


def kill_one(what, p, procs, seconds):
    "Kill a process of a kind after some seconds, or as soon as there is one; whether it was there"
    time.sleep(seconds)
    while p.poll() is None:
        try:
            v = psutil.Process(procs[what].pid) if what in procs else _victim(what, p)
        except psutil.NoSuchProcess:
            continue
        if v:
            try:
                v.kill()
                return True
            except psutil.NoSuchProcess:
                pass
        time.sleep(0.02)
    return False


@contextmanager
def small_disk(home, rng):
    """A file system of 2 MB mounted at `home`, nearly full; yields what makes room again, None where mounting is
    not permitted"""
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', str(home)], capture_output=True).returncode:
        yield None
        return
    filler = home / 'filler'
    room = rng.randint(20_000, 160_000)  # four whole jobs take about 240 kB
    try:
        filler.write_bytes(b'x' * (2 * 2**20 - room))
        yield filler.unlink
    finally:
        nothing_left(home)
        subprocess.run(['umount', str(home)], check=True)


def broken_run(d, home, what, address, procs, moment):
    "One run in which something is killed or fails; whether it came to that"
    out = home / 'out'
    wrong = what in ('hanging', 'failing')
    if wrong:
        (home / what).touch()
    p = drive(d, out, *([address] if address else []))
    there = kill_one(what, p, procs, moment) if what in KILLED else True
    code = p.wait(LONGEST)
    assert what != 'worker' or code == 0, f'{home.name}: a worker taken away fails the batch'
    if wrong:  # it alone, and what comes after it
        assert code == 1 and {f.parent.name for f in done(out)} == {'j0', 'j2'}, (
            f'{home.name}: {what}, done {list(done(out))}'
        )
        (home / what).unlink()
    assert what != 'disk full' or code, f'{home.name}: the disk did not run full'
    return there


KILLED = ('batch', 'notebook', 'kernel', 'worker', 'scheduler')
FAULTS = (*KILLED, 'disk full', 'hanging', 'failing')


def stub_round(d, seed, whole, length):
    "One seeded round: break it, run again, compare with an undisturbed run, look for orphans; what was broken"
    rng = random.Random(seed)
    what = FAULTS[seed % len(FAULTS)]
    home = d / f'r{seed}'
    home.mkdir()
    moment = rng.uniform(0.5, 0.8 * length)
    with (
        cluster(home) if what in ('worker', 'scheduler') else nullcontext((None, {})) as (address, procs),
        small_disk(home, rng) if what == 'disk full' else nullcontext(lambda: None) as make_room,
    ):
        if not make_room:
            return f'{what}: no right to mount'
        there = broken_run(d, home, what, address, procs, moment)
        make_room()
        before = done(home / 'out')
        assert drive(d, home / 'out').wait(LONGEST) == 0, f'round {seed}, {what}: the next run fails'
        assert results(home / 'out') == whole, f'round {seed}, {what}: other results'
        assert before.items() <= done(home / 'out').items(), f'round {seed}, {what}: what was done was done again'
    nothing_left(home)
    return what if there else f'{what}: too late'


def stub_notebook(d):
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook

    kernel = dict(name='python3', display_name='Python 3', language='python')
    nbformat.write(
        new_notebook(
            cells=[new_code_cell('output = ""\nname = ""', metadata=dict(tags=['parameters'])), new_code_cell(STUB)],
            metadata=dict(kernelspec=kernel),
        ),
        d / 'stub.ipynb',
    )


# ---- the two parts


def overhead(d, grid, n):
    grid.write_text(GRID.format(data=d / 'phantoms', seeds=list(range(n // 2))))
    first, _ = batch(grid, d / 'out')
    again, second = batch(grid, d / 'out')
    own = sum(r['seconds'] for r in first['results'])
    assert first['states'] == dict(done=n) and again['states'] == dict(reused=n)
    return dict(
        ratios={"wall time to the jobs' own seconds over two slots": first['seconds'] / (own / 2)},
        floors=dict(ratio=1.15, second_run_seconds=5),
        jobs=n,
        seconds=first['seconds'],
        own_seconds=round(own, 1),
        second_run_seconds=round(second, 1),
    )


def faults(d, grid, rounds, seconds):
    "Two rounds with true trainings, then the stubs; none begins after `seconds`"
    grid.write_text(GRID.format(data=d / 'phantoms', seeds=[0]))
    start = time.perf_counter()
    true = min(2, rounds)
    found = []
    took = lambda: time.perf_counter() - start
    batch(grid, d / 'trained')
    whole = weights(d / 'trained')
    assert len(whole) == 2
    stub_notebook(d)
    began = time.perf_counter()
    assert drive(d, d / 'whole').wait(LONGEST) == 0
    length = time.perf_counter() - began
    for seed in range(rounds):
        if took() > seconds:
            print(f'no round after {seed} of {rounds}: {took():.0f} s are over', file=sys.stderr)
            break
        at = took()
        what = (
            training_round(d, seed, grid, whole) if seed < true else stub_round(d, seed, results(d / 'whole'), length)
        )
        found.append(dict(seed=seed, fault=what, seconds=round(took() - at, 1)))
        print(f'round {seed}: {what}, {found[-1]["seconds"]} s, as an undisturbed run', file=sys.stderr)
    return dict(
        ratios={'rounds that ended as an undisturbed run': len(found) / rounds},
        rounds=found,
        rounds_asked=rounds,
        seconds_of_rounds=round(took(), 1),
    )


def processor() -> str:
    info = Path('/proc/cpuinfo')
    names = re.findall(r'model name\s*:\s*(.+)', info.read_text()) if info.is_file() else ()
    return re.sub(r'\((R|TM)\)', '', names[0]).strip() if names else platform.processor() or platform.machine()


BASELINE = dict(
    overhead="sum of the jobs' own seconds, divided by the slots", faults='an undisturbed run of the same jobs'
)


def tell(part, f):
    if part == 'overhead':
        print(
            f"{f['jobs']} jobs in {f['seconds']:.0f} s, {list(f['ratios'].values())[0]:.2f} times their own seconds over two slots; a second run {f['second_run_seconds']:.1f} s"
        )
    else:
        print(
            f"{len(f['rounds'])} of {f['rounds_asked']} rounds, the results the same after each: {', '.join(r['fault'] for r in f['rounds'])}"
        )


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true', help='4 jobs and no faults instead of 40 jobs and 20 rounds')
    p.add_argument('--only', choices=('overhead', 'faults'), help='one of the two parts')
    p.add_argument('--rounds', type=int, help='rounds of faults; default: 20, with --quick none')
    p.add_argument('--seconds', type=float, default=600.0, help='after which no round of faults begins')
    p.add_argument('--out', help='folder of the results; default: bench/results, with --quick none')
    p.add_argument('--json', action='store_true', help='one JSON document on standard output')
    a = p.parse_args()
    rounds = a.rounds if a.rounds is not None else 0 if a.quick else 20
    told = {}
    e = environment()
    machine = f"{processor()}, {e['cores']} cores"
    folder = Path(a.out) if a.out else None if a.quick else Path(__file__).parent / 'results'
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        from fada.data import prepare

        os.environ['FADA_QUIET'] = '1'
        prepare(d / 'phantoms', 60, ['Femur', 'Abdomen'], seed=5, workers=2)
        parts = dict(
            overhead=lambda: overhead(d, d / 'grid.toml', 4 if a.quick else 40),
            faults=lambda: faults(d, d / 'few.toml', rounds, a.seconds),
        )
        for part in [a.only] if a.only else parts if rounds else ['overhead']:
            f = parts[part]()
            told[part] = dict(f, baseline=BASELINE[part], machine=machine, load_average=os.getloadavg(), versions=e)
            if not a.json:
                tell(part, f)
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
                write_json(
                    folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', f'batch {part} {machine}').strip('-')}.json", told[part]
                )
    if a.json:
        print(
            json.dumps(
                dict(
                    ratios={k: v for f in told.values() for k, v in f['ratios'].items()},
                    baseline=BASELINE,
                    machine=machine,
                    versions=e,
                    **told,
                ),
                indent=1,
            )
        )


if __name__ == '__main__':
    main()
