"""What a batch costs beside its jobs: wall time of nano trainings on two slots against the jobs' own seconds divided by the slots,
the time of a second run that finds all done, and 20 seeded rounds of SIGKILL at random moments: two with true trainings, the others with
jobs that import nothing heavy, in which the batch, a notebook, a kernel, a worker or the scheduler is killed. After each a run that ends as
an undisturbed one, byte for byte, and nothing is left running. The whole takes about ten minutes on two quiet cores.

    python bench/batch.py --quick --json
"""
import argparse, json, os, random, signal, subprocess, sys, tempfile, time
from contextlib import contextmanager
from pathlib import Path
import psutil
from fada.settings import environment

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

def order(grid, out): return [sys.executable, '-m', 'fada.cli', 'batch', str(grid), '--out', str(out), '--quiet', '--json']

def batch(grid, out):
    "(record, seconds of the command) of one run"
    start = time.perf_counter(); r = subprocess.run(order(grid, out), capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    return json.loads(r.stdout), time.perf_counter()-start

def weights(out): return {p.parent.parent.name: p.read_bytes() for p in Path(out).glob('*/adapter/adapter_model.safetensors')}

def kill_trainings(d, grid, rounds, whole):
    "Kill the batch or a process below it at a random moment, run again, compare the adapters byte for byte; who was killed"
    killed = []
    for seed in range(rounds):
        rng = random.Random(seed); out = d/f'trained{seed}'; p = quiet(order(grid, out)); time.sleep(rng.uniform(8, 20))
        found = [psutil.Process(p.pid), *psutil.Process(p.pid).children(recursive=True)] if p.poll() is None else []
        if found: v = rng.choice(found); killed.append(f'training: {v.name()}'); v.kill()
        else: killed.append('training: too late')
        p.wait(); batch(grid, out); mine = weights(out)
        assert mine and all(whole[k] == v for k,v in mine.items()), f'training {seed}: other weights'
    return killed

# ---- rounds with jobs that import nothing heavy: the same batch, many more moments

STUB = '''from pathlib import Path
import hashlib, time
out = Path(output); out.mkdir(parents=True, exist_ok=True); log = out/"answers.jsonl"
whole = [l for l in log.read_text().splitlines(True) if l.endswith("\\n")] if log.exists() else []
if whole: log.write_text("".join(whole))   # a torn last line is written again
with open(log, "a") as f:
    for k in range(len(whole), 12): f.write(f"{name} {k}\\n"); f.flush(); time.sleep(.05)
(out/"weights").write_bytes(hashlib.sha256(log.read_bytes()).digest()*1000)'''

DRIVER = '''import sys
from contextlib import nullcontext
from pathlib import Path
from fada.batch import Job, run_jobs
d, out, address = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
job = lambda k: Job(f"j{k}", d/"stub.ipynb", dict(output=str(out/f"j{k}"), name=f"j{k}"), out/f"j{k}", outputs=[out/f"j{k}"/"weights"],
                    after=(f"j{k-2}",) if k > 1 else (), stop=out/"stop")
jobs = [job(k) for k in range(4)]; out.mkdir(exist_ok=True); (out/"stop").unlink(missing_ok=True)
if address:
    from fada.cluster import joined
    with joined(address[0], lambda line: None) as c: r = run_jobs(jobs, c.slots, executor=c.executor, look=c.look)
else: r = run_jobs(jobs, 2)
sys.exit(0 if {x.state for x in r} <= {"done", "reused"} else 1)'''

def quiet(words, **kw): return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, **kw)

def findable(d): return dict(os.environ, JUPYTER_RUNTIME_DIR=str(d/'runtime'))   # a kernel has the path of its connection file on its command line

def drive(d, out, *address): return quiet([sys.executable, '-c', DRIVER, str(d), str(out), *address], env=findable(out.parent))

def results(out):
    assert not list(out.glob('*.part')), f'{out}: unfinished'
    return {p.relative_to(out).as_posix(): p.read_bytes() for k in range(4) for p in (out/f'j{k}'/'answers.jsonl', out/f'j{k}'/'weights')}

def below(d):
    "Processes that have to do with a folder, but for this one"
    found = []
    for p in psutil.process_iter():
        try:
            if p.pid != os.getpid() and str(d) in ' '.join(p.cmdline()) and p.status() != psutil.STATUS_ZOMBIE: found.append(p)
        except psutil.Error: pass   # gone meanwhile
    return found

@contextmanager
def cluster(d):
    "(address, {scheduler, worker: process}) of a Dask scheduler with two workers"
    at, procs = d/'scheduler.json', {}
    start = lambda name, *words: procs.setdefault(name, quiet([sys.executable, '-m', *words], cwd=d, env=findable(d)))
    start('scheduler', 'distributed.cli.dask_scheduler', '--host', '127.0.0.1', '--port', '0', '--no-dashboard', '--scheduler-file', str(at))
    for n in ('worker', 'other'):
        start(n, 'distributed.cli.dask_worker', '--scheduler-file', str(at), '--nthreads', '1', '--no-nanny', '--no-dashboard', '--local-directory', str(d/n))
    while not at.exists(): time.sleep(.1)
    from distributed import Client
    address = json.loads(at.read_text())['address']
    with Client(address, set_as_default=False) as c: c.wait_for_workers(2, timeout=120)
    try: yield address, procs
    finally:
        for p in procs.values():
            if p.poll() is None: os.killpg(p.pid, signal.SIGKILL)
            p.wait()

def _victim(what, p):
    "A process of the batch `p` that is a notebook's or a kernel, or the batch itself; None where there is none now"
    if what == 'batch': return psutil.Process(p.pid)
    mark = {'notebook': 'fada.batch', 'kernel': 'ipykernel_launcher'}[what]
    return next((c for c in psutil.Process(p.pid).children(recursive=True) if mark in c.cmdline()), None)

def kill_one(what, p, procs, seconds):
    "Kill a process of a kind after some seconds, or as soon as there is one; whether it was there"
    time.sleep(seconds)
    while p.poll() is None:
        try: v = psutil.Process(procs[what].pid) if what in procs else _victim(what, p)
        except psutil.NoSuchProcess: continue
        if v:
            try: v.kill(); return True
            except psutil.NoSuchProcess: pass
        time.sleep(.02)
    return False

def stub_round(d, seed, whole, length):
    "One seeded round: kill, run again, compare with an undisturbed run, look for orphans; what was killed"
    from contextlib import nullcontext
    rng = random.Random(seed); what = ('batch', 'notebook', 'kernel', 'worker', 'scheduler')[seed % 5]; home = d/f'r{seed}'; home.mkdir()
    with (cluster(home) if what in ('worker', 'scheduler') else nullcontext((None, {}))) as (address, procs):
        p = drive(d, home/'out', *([address] if address else [])); there = kill_one(what, p, procs, rng.uniform(.5, .8*length))
        code = p.wait(300); assert what != 'worker' or code == 0, f'round {seed}: a worker taken away fails the batch'
    p = drive(d, home/'out'); assert p.wait(300) == 0, f'round {seed}: the next run fails'
    assert results(home/'out') == whole, f'round {seed}: other results'
    end = time.monotonic()+20
    while (left := below(home)) and time.monotonic() < end: time.sleep(.2)
    assert not left, f'round {seed}: left running {[p.cmdline()[:4] for p in left]}'
    return what if there else f'{what}: too late'

def kill_stubs(d, rounds):
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook
    kernel = dict(name='python3', display_name='Python 3', language='python')
    nbformat.write(new_notebook(cells=[new_code_cell('output = ""\nname = ""', metadata=dict(tags=['parameters'])), new_code_cell(STUB)],
                                metadata=dict(kernelspec=kernel)), d/'stub.ipynb')
    start = time.perf_counter(); assert drive(d, d/'whole').wait(300) == 0; length = time.perf_counter()-start
    return [stub_round(d, seed, results(d/'whole'), length) for seed in range(rounds)]

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true', help='4 jobs and no kills instead of 40 jobs and 20 rounds')
    p.add_argument('--rounds', type=int, help='rounds of SIGKILL')
    p.add_argument('--json', action='store_true', help='one JSON document on standard output')
    a = p.parse_args(); n = 4 if a.quick else 40; rounds = a.rounds if a.rounds is not None else 0 if a.quick else 20
    with tempfile.TemporaryDirectory() as d:
        d = Path(d); data = d/'phantoms'; from fada.data import prepare
        os.environ['FADA_QUIET'] = '1'; prepare(data, 60, ['Femur', 'Abdomen'], seed=5, workers=2)
        grid = d/'grid.toml'; grid.write_text(GRID.format(data=data, seeds=list(range(n//2))))
        first,_ = batch(grid, d/'out'); _,second = batch(grid, d/'out'); own = sum(r['seconds'] for r in first['results'])
        (d/'few.toml').write_text(GRID.format(data=data, seeds=[0])); true = min(2, rounds); start = time.perf_counter()
        killed = kill_trainings(d, d/'few.toml', true, weights(d/'out'))+kill_stubs(d, rounds-true) if rounds else []
    out = dict(ratios={'wall time to the jobs\' own seconds over two slots': first['seconds']/(own/2)}, baseline='sum of the jobs\' own seconds, divided by the slots',
               jobs=n, seconds=first['seconds'], own_seconds=own, second_run_seconds=round(second, 1), rounds=rounds, seconds_of_rounds=round(time.perf_counter()-start, 1), killed=killed, load=os.getloadavg(),
               machine={k: environment()[k] for k in ('system', 'machine', 'cores')}, versions=environment())
    print(json.dumps(out, indent=1) if a.json else f"{n} jobs in {first['seconds']:.0f} s, {out['ratios'].popitem()[1]:.2f} times their own seconds over two slots; "
          f"a second run {second:.1f} s; {rounds} rounds of SIGKILL, the results the same after each: {', '.join(killed) or 'none'}")

if __name__ == '__main__': main()
