"""Speed of the engine and peak memory against the plan, for models of the true shape with random weights: nothing is downloaded.

Speed: one image with eight questions, and a table of images with eight questions each, against one processor call and one
`generate` per question (the baseline) and against a plain batched `generate`; 30-token questions, exactly 12 new tokens, greedy,
best of several alternating runs. On the table the loop is timed on its first images and reckoned for all. Pixels come from a
stand-in processor, so decoding of images is not counted. Memory: each run is a process of its own (`fada measure --random`); on a
card the peak is that of torch's allocator, and the prediction leaves out the CUDA context.

Writes bench/results/gpu-<machine>.json. On a machine without a card, `--tiny` goes through the same motions with tiny shapes.

    python bench/gpu.py --quick --json
"""
import argparse, gc, json, re, subprocess, sys, tempfile
from pathlib import Path
from fada.settings import FadaError, environment, write_json

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'bench'))
QUICK = ('smolvlm-256m', 'blip2-opt-2.7b', 'medgemma-4b')
ALL = (*QUICK, 'blip2-flan-t5-xl', 'instructblip-vicuna-7b', 'llava-1.5-7b', 'qwen2.5-vl-3b', 'qwen3-vl-2b', 'internvl3.5-4b',
       'paligemma2-3b', 'florence-2-large', 'medgemma-4b-text', 'blip2-medgemma-4b')
SPEED = (('blip2-opt-2.7b', 'bf16'), ('blip2-opt-2.7b', 'int8'), ('llava-1.5-7b', 'bf16'), ('llava-1.5-7b', 'nf4'),
         ('medgemma-4b', 'bf16'), ('qwen2.5-vl-3b', 'bf16'))
TINY_SPEED = tuple((m, 'fp32') for m in ('blip2-opt-2.7b', 'llava-1.5-7b', 'medgemma-4b', 'qwen2.5-vl-3b'))

def measure(model, task, precision, device, *more):
    "What `fada measure` says, or {failed: its sentence}"
    r = subprocess.run([sys.executable, '-m', 'fada.cli', 'measure', model, '--random', '--task', task, '--precision', precision,
                        '--device', device, '--batch', '1', '--json', '--quiet', *more], capture_output=True, text=True, cwd=ROOT)
    if r.returncode: return dict(model=model, task=task, precision=precision, failed=r.stderr.strip().splitlines()[-1][:300])
    return json.loads(r.stdout)

def tiny_shapes(folder):
    "{model: folder of a tiny model of its architecture}"
    sys.path.insert(0, str(ROOT/'tests'))
    from tiny import row, tiny as make
    return {row(a).name: str(make(a, folder)[2]) for a in ('blip2-opt', 'llava', 'smolvlm', 'gemma3', 'qwen2.5-vl')}

def speed(model, precision, device, config, images:int, loop_images:int, times:int)->dict:
    "Both uses of one model, or why there is no figure"
    import torch
    from engine import NEW, TOKENS, use
    from fada.plan import open_for_measure, plan
    from fada.registry import model_spec
    out = dict(model=model, precision=precision)
    if device.startswith('cuda'):
        p = plan(model, 'answer', precision, gpu=torch.cuda.get_device_properties(device).total_memory, reserve=0, find=False)
        if p.verdict == 'no': return dict(out, failed=f'needs {p.peak_bytes/2**30:.1f} GiB')
    try:
        vlm = open_for_measure(model_spec(model), precision, device, random=True, config=config, new_tokens=NEW, prompt=TOKENS)
        asked = [f'question {k}' for k in range(8)]; pictures = blanks(images)
        return dict(out, one_image=use(vlm, pictures[:1], asked, times), table=dict(images=images, **use(vlm, pictures, asked, times, loop_images)))
    except (FadaError, RuntimeError) as e: return dict(out, failed=f'{type(e).__name__}: {e}'[:300])
    finally:
        vlm = None; gc.collect()
        if device.startswith('cuda'): torch.cuda.empty_cache()

def blanks(n):
    "Pictures that differ: a stand-in processor makes the same pixels of all"
    import numpy as np
    return [np.full((16, 16, 3), k % 256, np.uint8) for k in range(n)]

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true', help='fewer models, answering only, smaller tables')
    p.add_argument('--json', action='store_true', help='one JSON document on standard output')
    p.add_argument('--device', help='cuda or cpu; default: cuda where there is one')
    p.add_argument('--only', choices=('speed', 'memory'), help='one of the two parts')
    p.add_argument('--tiny', action='store_true', help='tiny shapes: a check of this script, not a result')
    p.add_argument('--out', help='folder of the result; default: bench/results')
    a = p.parse_args()
    import torch
    from fada.plan import _machine
    device = a.device or ('cuda:0' if torch.cuda.is_available() else 'cpu'); tiny = a.tiny or device == 'cpu'
    with tempfile.TemporaryDirectory() as d:
        small = tiny_shapes(d) if tiny else {}
        fast = [] if a.only == 'memory' else [speed(m, q, device, small.get(m), *((4, 2, 1) if tiny or a.quick else (64, 4, 5)))
                for m, q in (TINY_SPEED if tiny else SPEED[:3] if a.quick else SPEED)]
        words = lambda m: ('--config', small[m], '--new-tokens', '8', '--questions', '2') if tiny else ()
        rows = [] if a.only == 'speed' else [measure(m, task, precision, device, *words(m))
                for m in ([*small][:3] if tiny else QUICK if a.quick else ALL)
                for task in (('answer',) if a.quick else ('answer', 'train'))
                for precision in ((('fp32',) if tiny else ()) + (() if tiny and a.quick else ('bf16', 'int8', 'nf4')))]
    machine = _machine(device)
    ratios = {f"{r['model']} {r['task']} {r['precision']}, peak": r['predicted_bytes']/r['peak_bytes'] for r in rows if 'failed' not in r}
    ratios |= {f"{r['model']} {r['precision']}, {name}": r[k]['ratios']['engine'] for r in fast if 'failed' not in r
               for k, name in (('one_image', 'one image'), ('table', 'table'))}
    out = dict(ratios=ratios, baseline="speed: one processor call and one `generate` per question; peak: torch's allocator, weights included",
               tiny=tiny, speed=fast, memory=rows, machine=machine, versions=environment())
    folder = Path(a.out) if a.out else None if tiny else ROOT/'bench'/'results'
    if folder: folder.mkdir(parents=True, exist_ok=True); write_json(folder/f"gpu-{re.sub(r'[^0-9A-Za-z]+', '-', machine).strip('-')}.json", out)
    if a.json: print(json.dumps(out, indent=1))
    else: tell(fast, rows, machine, tiny)

def tell(fast, rows, machine, tiny):
    "All figures in lines"
    for r in fast:
        said = r.get('failed') or '; '.join(
            f"{name} {r[k]['ratios']['engine']:.1f} times the loop, {r[k]['ratios']['against batched generate']:.1f} times batched generate, "
            f"same tokens {r[k]['same_tokens']['engine']} of {r[k]['same_tokens']['of']}" for k, name in (('one_image', 'one image'), ('table', 'table')))
        print(f"{r['model']:26} {r['precision']:5} {said}")
    for r in rows: print(f"{r['model']:26} {r['task']:7} {r['precision']:5} "+(r.get('failed') or
              f"{r['peak_bytes']/2**30:7.3f} GiB measured, {100*r['error']:+6.1f} % predicted"))
    print(f'on {machine}'+('; tiny shapes: no result' if tiny else ''))

if __name__ == '__main__': sys.exit(main())
