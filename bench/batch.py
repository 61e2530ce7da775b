"""What a batch costs beside its jobs: wall time of nano trainings on two slots against the jobs' own seconds divided by the slots,
the time of a second run that finds all done, and seeded rounds of SIGKILL at random moments with a run after each.

    python bench/batch.py --quick --json
"""
import argparse, json, os, random, signal, subprocess, sys, tempfile, time
from pathlib import Path
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

def kill_rounds(d, data, rounds, whole):
    "Kill the batch or a process below it at a random moment, run again, compare the adapters byte for byte"
    import psutil
    killed = []
    for seed in range(rounds):
        rng = random.Random(seed); out = d/f'round{seed}'; grid = d/'few.toml'
        p = subprocess.Popen(order(grid, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        time.sleep(rng.uniform(2, 25)); victims = [psutil.Process(p.pid), *psutil.Process(p.pid).children(recursive=True)] if p.poll() is None else []
        if victims: v = rng.choice(victims); killed.append(v.name()); v.kill()
        p.wait(); batch(grid, out); mine = weights(out)
        assert mine and all(whole[k] == v for k,v in mine.items()), f'round {seed}: other weights'
    return killed

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
        (d/'few.toml').write_text(GRID.format(data=data, seeds=[0, 1])); killed = kill_rounds(d, data, rounds, weights(d/'out'))
    out = dict(ratios={'wall time to the jobs\' own seconds over two slots': first['seconds']/(own/2)}, baseline='sum of the jobs\' own seconds, divided by the slots',
               jobs=n, seconds=first['seconds'], own_seconds=own, second_run_seconds=round(second, 1), rounds=rounds, killed=killed, load=os.getloadavg(),
               machine={k: environment()[k] for k in ('system', 'machine', 'cores')}, versions=environment())
    print(json.dumps(out, indent=1) if a.json else f"{n} jobs in {first['seconds']:.0f} s, {out['ratios'].popitem()[1]:.2f} times their own seconds over two slots; "
          f"a second run {second:.1f} s; {rounds} rounds of SIGKILL, the weights the same after each")

if __name__ == '__main__': main()
