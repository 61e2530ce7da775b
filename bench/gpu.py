"""Predicted against measured peak memory of models of the true shape with random weights: nothing is downloaded.

Each run is a process of its own (`fada measure --random`). On a card the peak is that of torch's allocator; the prediction
leaves out the CUDA context there. On a machine without one, `--device cpu --tiny` goes through the same motions with tiny
shapes. Writes bench/results/memory-<machine>.json. The baseline is the measured peak.

    python bench/gpu.py --quick --json
"""
import argparse, json, re, subprocess, sys, tempfile
from pathlib import Path
from fada.settings import environment, write_json

ROOT = Path(__file__).resolve().parents[1]
QUICK = ('smolvlm-256m', 'blip2-opt-2.7b', 'medgemma-4b')
ALL = (*QUICK, 'blip2-flan-t5-xl', 'instructblip-vicuna-7b', 'llava-1.5-7b', 'qwen2.5-vl-3b', 'qwen3-vl-2b', 'internvl3.5-4b',
       'paligemma2-3b', 'florence-2-large', 'medgemma-4b-text', 'blip2-medgemma-4b')

def measure(model, task, precision, device, *more):
    "What `fada measure` says, or {error: its sentence}"
    r = subprocess.run([sys.executable, '-m', 'fada.cli', 'measure', model, '--random', '--task', task, '--precision', precision,
                        '--device', device, '--json', '--quiet', *more], capture_output=True, text=True, cwd=ROOT)
    if r.returncode: return dict(model=model, task=task, precision=precision, failed=r.stderr.strip().splitlines()[-1][:300])
    return json.loads(r.stdout)

def shapes(tiny, folder):
    "{model: further words for `fada measure`}"
    if not tiny: return {m: () for m in ALL}
    sys.path.insert(0, str(ROOT/'tests'))
    from tiny import row, tiny as make
    return {row(a).name: ('--config', str(make(a, folder)[2]), '--new-tokens', '8', '--questions', '2')
            for a in ('blip2-opt', 'llava', 'smolvlm')}

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true', help='three models, answering only')
    p.add_argument('--json', action='store_true', help='one JSON document on standard output')
    p.add_argument('--device', help='cuda or cpu; default: cuda where there is one')
    p.add_argument('--tiny', action='store_true', help='tiny shapes: a check of this script, not a result')
    p.add_argument('--out', help='folder of the result; default: bench/results')
    a = p.parse_args()
    import torch
    device = a.device or ('cuda:0' if torch.cuda.is_available() else 'cpu'); tiny = a.tiny or device == 'cpu'
    with tempfile.TemporaryDirectory() as d:
        rows = [measure(m, task, precision, device, *more) for m, more in shapes(tiny, d).items() if tiny or not a.quick or m in QUICK
                for task in (('answer',) if a.quick else ('answer', 'train'))
                for precision in ((('fp32',) if tiny else ()) + (() if tiny and a.quick else ('bf16', 'int8', 'nf4')))]
    done = [r for r in rows if 'failed' not in r]
    machine = done[0]['machine'] if done else device
    out = dict(ratios={f"{r['model']} {r['task']} {r['precision']}": r['predicted_bytes']/r['peak_bytes'] for r in done},
               baseline='peak of torch\'s allocator, weights included', tiny=tiny, rows=rows, machine=machine, versions=environment())
    folder = Path(a.out) if a.out else ROOT/'bench'/'results'; folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r'\W+', '-', machine).strip('-')
    if not tiny or a.out: write_json(folder/f'memory-{name}.json', out)
    if a.json: print(json.dumps(out, indent=1))
    else:
        for r in rows: print(f"{r['model']:26} {r['task']:7} {r['precision']:5} "+(r.get('failed') or
                  f"{r['peak_bytes']/2**30:7.3f} GiB measured, {100*r['error']:+6.1f} % predicted"))
        print(f'on {machine}'+('; tiny shapes: no result' if tiny else ''))

if __name__ == '__main__': sys.exit(main())
