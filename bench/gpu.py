"""Speed of the engine and of training, and peak memory against the plan, for models of the true shape with random
weights: nothing is downloaded.

Speed: one image with eight questions, and a table of images with eight questions each, against one processor call
and one `generate` per question (the baseline) and against a plain batched `generate`; 30-token questions, exactly
12 new tokens, greedy, best of several alternating runs, at least two and no new one after `--seconds`. On the table
the loop is timed on its first images and reckoned for all. Training: transformers' Trainer with peft, one question
a row, the tower at every row, against FADA's packed steps, the keeping of features among them; same LoRA, same rows
a step. Pixels come from a stand-in processor, so decoding of images is not counted. Memory: each run is a process
of its own (`fada measure --random`), several at once, so their seconds are not kept; on a card the peak is that of
torch's allocator, and the prediction leaves out the CUDA context, which is measured beside.

Writes bench/results/gpu-<machine>.json. On a machine without a card, `--tiny` goes through the same motions with
tiny shapes.

    python bench/gpu.py --quick --json
"""

import argparse, gc, json, re, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from fada.settings import FadaError, environment, write_json

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'bench'))
QUICK = ('smolvlm-256m', 'blip2-opt-2.7b', 'medgemma-4b')
ALL = (
    *QUICK,
    'blip2-flan-t5-xl',
    'instructblip-vicuna-7b',
    'llava-1.5-7b',
    'qwen2.5-vl-3b',
    'qwen3-vl-2b',
    'internvl3.5-4b',
    'paligemma2-3b',
    'florence-2-large',
    'medgemma-4b-text',
    'blip2-medgemma-4b',
)
SPEED = (
    ('blip2-opt-2.7b', 'bf16'),
    ('llava-1.5-7b', 'bf16'),
    ('medgemma-4b', 'bf16'),
    ('qwen2.5-vl-3b', 'bf16'),
    ('blip2-opt-2.7b', 'int8'),
    ('llava-1.5-7b', 'nf4'),
)
TRAIN = (('blip2-opt-2.7b', 'int8'), ('llava-1.5-7b', 'nf4'))
TINY_SPEED = tuple((m, 'fp32') for m in ('blip2-opt-2.7b', 'llava-1.5-7b', 'medgemma-4b', 'qwen2.5-vl-3b'))


def measure(model, task, precision, device, *more):
    "What `fada measure` says, or {failed: its sentence}"
    r = subprocess.run(
        [
            sys.executable,
            '-m',
            'fada.cli',
            'measure',
            model,
            '--random',
            '--task',
            task,
            '--precision',
            precision,
            '--device',
            device,
            '--batch',
            '1',
            '--json',
            '--quiet',
            *more,
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    if r.returncode:
        return dict(
            model=model,
            task=task,
            precision=precision,
            failed=(r.stderr.strip().splitlines() or ['no word'])[-1][:300],
        )
    return {k: v for k, v in json.loads(r.stdout).items() if 'second' not in k}  # others ran beside it


def context() -> int:
    """Bytes that the driver holds for one process beside what torch's allocator reserved, on a card with nothing
    else on it"""
    import torch

    free, total = torch.cuda.mem_get_info()
    x = torch.ones(64, 64, device='cuda')
    (x @ x).sum().item()
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def tiny_shapes(folder):
    "{model: folder of a tiny model of its architecture}"
    sys.path.insert(0, str(ROOT / 'tests'))
    from tiny import row, tiny as make

    return {row(a).name: str(make(a, folder)[2]) for a in ('blip2-opt', 'llava', 'smolvlm', 'gemma3', 'qwen2.5-vl')}


def limits() -> dict:
    "What the card reaches: bf16 arithmetic and memory bandwidth"
    import torch

    a = torch.randn(8192, 8192, device='cuda', dtype=torch.bfloat16)
    big = torch.randn(2**28, device='cuda')

    def best(f):
        f()
        torch.cuda.synchronize()
        times = []
        for _ in range(5):
            t = time.perf_counter()
            f()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - t)
        return min(times)

    return dict(tflops=2 * 8192**3 / best(lambda: a @ a) / 1e12, gbytes=2 * big.nbytes / best(big.clone) / 1e9)


def speed(model, precision, device, config, images: int, loop_images: int, times: int, seconds: float) -> dict:
    "Both uses of one model, or why there is no figure"
    import torch
    from engine import NEW, TOKENS, use
    from fada.plan import open_for_measure, plan
    from fada.registry import model_spec

    out = dict(model=model, precision=precision)
    if device.startswith('cuda'):
        p = plan(
            model,
            'answer',
            precision,
            gpu=torch.cuda.get_device_properties(device).total_memory,
            reserve=0,
            find=False,
        )
        if p.verdict == 'no':
            return dict(out, failed=f'needs {p.peak_bytes / 2**30:.1f} GiB')
    try:
        vlm = open_for_measure(
            model_spec(model), precision, device, random=True, config=config, new_tokens=NEW, prompt=TOKENS
        )
        asked = [f'question {k}' for k in range(8)]
        pictures = blanks(images)
        return dict(
            out,
            recorded=records(vlm, pictures[:1], asked),
            one_image=use(vlm, pictures[:1], asked, times, seconds=seconds),
            table=dict(images=images, **use(vlm, pictures, asked, times, loop_images, seconds)),
        )
    except (FadaError, RuntimeError) as e:
        return dict(out, failed=f'{type(e).__name__}: {e}'[:300])
    finally:
        vlm = None
        gc.collect()
        if device.startswith('cuda'):
            torch.cuda.empty_cache()


def train_speed(model, precision, device, config, images: int, batch: int, times: int) -> dict:
    """Seconds of an epoch of `images` with eight questions each, the usual way and FADA's, and the losses before
    training"""
    import torch, warnings
    from fada.loop import LoraRecipe, answer_tokens
    from fada.memory import allocator_peak
    from fada.plan import BlankMaterial, _WORD, open_for_measure
    from fada.registry import model_spec
    from fada.train import add_lora
    from transformers import Trainer, TrainingArguments

    warnings.filterwarnings('ignore')
    out = dict(model=model, precision=precision, images=images, images_a_step=batch, questions=8)
    vlm = open_for_measure(model_spec(model), precision, device, random=True, config=config)
    add_lora(vlm, 8)
    recipe = LoraRecipe(batch=batch, cache=True)
    trained = [p for p in vlm.model.parameters() if p.requires_grad]
    said_tokens = answer_tokens(vlm, 'a')

    def collate(rows):
        t = vlm.processor(images=rows, text=['i'] * len(rows), return_tensors='pt')
        said = torch.full((len(rows), said_tokens), _WORD)
        if not hasattr(vlm, 'render'):
            said[:, -1] = vlm.processor.eos_token_id
        ids = torch.cat((t['input_ids'], said), 1)
        end = {'input_ids': ids, 'attention_mask': torch.ones_like(ids)}
        if 'token_type_ids' in t:
            end['token_type_ids'] = torch.cat((t['token_type_ids'], 0 * said), 1)
        return {**t, **end, 'labels': torch.cat((torch.full_like(t['input_ids'], -100), said), 1)}

    def usual(n, folder):
        a = TrainingArguments(
            folder,
            per_device_train_batch_size=8 * batch,
            num_train_epochs=1,
            learning_rate=1e-4,
            report_to=[],
            save_strategy='no',
            logging_strategy='no',
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=device == 'cpu',
            max_grad_norm=1.0,
        )
        t = Trainer(model=vlm.model, args=a, train_dataset=list(range(8 * n)), data_collator=collate)
        t.log = lambda *x, **k: None
        t.train()

    def ours(n, folder):
        opt = torch.optim.AdamW(trained, lr=1e-4)
        m = BlankMaterial(vlm, n, 8, recipe)
        vlm.core.train()
        for k in range(0, n, batch):
            opt.zero_grad()
            m.loss(list(range(k, min(n, k + batch)))).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            opt.step()
        vlm.core.eval()

    def clock(f, n, folder):
        start = time.perf_counter()
        f(n, folder)
        if device != 'cpu':
            torch.cuda.synchronize()
        return time.perf_counter() - start

    try:
        with tempfile.TemporaryDirectory() as d:
            with torch.no_grad():
                there = {k: v.to(vlm.core.device) for k, v in collate([0] * 8).items()}
                first = BlankMaterial(vlm, 1, 8, recipe).loss([0])
                out['losses'] = dict(usual=float(vlm.model(**there).loss), ours=float(first))
            peaks = {}
            for k, f in (('usual', usual), ('ours', ours)):  # what is done once is not timed
                with allocator_peak(device) as p:
                    f(batch, d)
                peaks[k] = p['peak'] or p['bytes']
            best = {k: min(clock(f, images, d) for _ in range(times)) for k, f in (('usual', usual), ('ours', ours))}
        return dict(
            out,
            seconds=best,
            samples_a_second={k: 8 * images / v for k, v in best.items()},
            ratio=best['usual'] / best['ours'],
            peak_bytes=peaks,
        )
    except (FadaError, RuntimeError) as e:
        return dict(out, failed=f'{type(e).__name__}: {e}'[:300])
    finally:
        vlm = None
        gc.collect()
        if device.startswith('cuda'):
            torch.cuda.empty_cache()


def records(vlm, images, asked) -> bool:
    "Whether steps of this model are recorded as a CUDA graph"
    from engine import engine_
    from fada import decode

    made = []
    record = decode.Tape.record
    decode.Tape.record = lambda tape: made.append(record(tape)) or made[-1]
    try:
        engine_(vlm, images, asked)
    finally:
        decode.Tape.record = record
    return bool(made) and all(made)


def maps(model, precision, device, config) -> dict:
    "Memory beyond the weights of a relevancy map, two answer rows after 48 tokens"
    from PIL import Image
    from fada.attention import carried_down
    from fada.families import append_answers
    from fada.memory import allocator_peak
    from fada.plan import open_for_measure
    from fada.registry import model_spec

    vlm = open_for_measure(model_spec(model), precision, device, random=True, config=config)
    ids = [5] * 48
    t = append_answers(vlm.inputs([Image.new('RGB', (16, 16))], ['i q']), [ids], 0)
    t.pop('labels')
    first = t['input_ids'].shape[1] - len(ids) - 1
    times = []
    with allocator_peak(device) as p:
        carried_down(vlm.core, t, slice(first, first + 2), ids[:2])
    for _ in range(3):
        start = time.perf_counter()
        float(carried_down(vlm.core, t, slice(first, first + 2), ids[:2]).sum())
        times.append(time.perf_counter() - start)
    return dict(model=model, precision=precision, bytes=p['bytes'], seconds=min(times))


def blanks(n):
    "Pictures that differ: a stand-in processor makes the same pixels of all"
    import numpy as np

    return [np.full((16, 16, 3), k % 256, np.uint8) for k in range(n)]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true', help='fewer models, answering only, smaller tables')
    p.add_argument('--json', action='store_true', help='one JSON document on standard output')
    p.add_argument('--device', help='cuda or cpu; default: cuda where there is one')
    p.add_argument('--only', help='of speed, training, maps and memory, separated by commas; default: all')
    p.add_argument('--models', help='these alone, names separated by commas; default: those of the table')
    p.add_argument('--precision', help='this alone; default: those of the table')
    p.add_argument(
        '--seconds', type=float, default=20, help='no new run of a use after so many; default: %(default)s'
    )
    p.add_argument('--beside', type=int, default=4, help='measurements of memory at once; default: %(default)s')
    p.add_argument('--tiny', action='store_true', help='tiny shapes: a check of this script, not a result')
    p.add_argument('--out', help='folder of the result; default: bench/results')
    a = p.parse_args()
    import torch
    from fada.checkpoints import _quiet
    from fada.plan import _machine

    parts = ('speed', 'training', 'maps', 'memory') if not a.only else a.only.split(',')
    _quiet()
    device = a.device or ('cuda:0' if torch.cuda.is_available() else 'cpu')
    tiny = a.tiny or device == 'cpu'
    out = {}

    def only(found):  # names, or tuples of a name and a precision
        of = lambda x: (x, None) if isinstance(x, str) else (x[0], x[-1])
        return [
            x
            for x in found
            if (not a.models or of(x)[0] in a.models.split(',')) and a.precision in (None, *of(x)[1:])
        ]

    with tempfile.TemporaryDirectory() as d:
        small = tiny_shapes(d) if tiny else {}
        fast, learnt, rows = [], [], []
        if device != 'cpu':
            out |= dict(context_bytes=context(), limits=limits())
        words = lambda m: ('--config', small[m], '--new-tokens', '8', '--questions', '2') if tiny else ()

        def keep():
            return save(
                dict(
                    ratios=ratios(fast, learnt, rows),
                    baseline="speed: one processor call and one `generate` per question; training: "
                    "transformers' Trainer with peft, one question a row; peak: torch's allocator, weights included",
                    tiny=tiny,
                    **out,
                    speed=fast,
                    training=learnt,
                    memory=rows,
                    machine=_machine(device),
                    versions=environment(),
                ),
                a,
                tiny,
            )

        for m, q in only(TINY_SPEED if tiny else SPEED[:3] if a.quick else SPEED) if 'speed' in parts else ():
            fast.append(speed(m, q, device, small.get(m), *((4, 2, 1) if tiny or a.quick else (64, 2, 5)), a.seconds))
            keep()
        for m, q in only(TINY_SPEED[:2] if tiny else TRAIN) if 'training' in parts else ():
            learnt.append(train_speed(m, q, device, small.get(m), *((4, 2, 1) if tiny or a.quick else (16, 4, 2))))
            keep()
        if 'maps' in parts and only(['llava-1.5-7b']):
            out['maps'] = [
                maps('llava-1.5-7b', q, device, small.get('llava-1.5-7b'))
                for q in (('fp32',) if tiny else ('bf16', 'nf4'))
            ]
            keep()
        tasks = only(
            [
                (m, task, precision)
                for m in ([*small][:3] if tiny else QUICK if a.quick else ALL)
                for task in (('answer',) if a.quick else ('answer', 'train'))
                for precision in ((('fp32',) if tiny else ()) + (() if tiny and a.quick else ('bf16', 'int8', 'nf4')))
            ]
        )
        if 'memory' in parts:
            with ThreadPoolExecutor(1 if tiny else a.beside) as pool:
                for r in pool.map(lambda t: measure(*t, device, *words(t[0])), tasks):
                    rows.append(r)
                    keep()
    final = keep()
    if a.json:
        print(json.dumps(final, indent=1))
    else:
        tell(fast, learnt, rows, _machine(device), tiny)


def ratios(fast, learnt, rows) -> dict:
    return (
        {
            f"{r['model']} {r['task']} {r['precision']}, peak": r['predicted_bytes'] / r['peak_bytes']
            for r in rows
            if 'failed' not in r
        }
        | {
            f"{r['model']} {r['precision']}, {name}": r[k]['ratios']['engine']
            for r in fast
            if 'failed' not in r
            for k, name in (('one_image', 'one image'), ('table', 'table'))
        }
        | {f"{r['model']} {r['precision']}, training": r['ratio'] for r in learnt if 'failed' not in r}
    )


def save(found: dict, a, tiny: bool) -> dict:
    "Write what there is so far: a lent machine may be taken away"
    folder = Path(a.out) if a.out else None if tiny else ROOT / 'bench' / 'results'
    if not folder:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"gpu-{re.sub(r'[^0-9A-Za-z]+', '-', found['machine']).strip('-')}.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    if before.get('versions') == found['versions']:  # parts that were measured before by the same software stay
        for part in ('speed', 'training', 'memory'):
            now = [(r['model'], r['precision'], r.get('task')) for r in found[part]]
            found[part] = [r for r in before[part] if (r['model'], r['precision'], r.get('task')) not in now] + found[
                part
            ]
        if 'maps' in before:
            found.setdefault('maps', before['maps'])
        found['ratios'] = ratios(found['speed'], found['training'], found['memory'])
    write_json(path, found)
    return found


def tell(fast, learnt, rows, machine, tiny):
    "All figures in lines"
    for r in fast:
        said = r.get('failed') or '; '.join(
            f"{name} {r[k]['ratios']['engine']:.1f} times the loop, {r[k]['ratios']['against batched generate']:.1f} times batched generate, "
            f"same tokens {r[k]['same_tokens']['engine']} of {r[k]['same_tokens']['of']}"
            for k, name in (('one_image', 'one image'), ('table', 'table'))
        )
        print(f"{r['model']:26} {r['precision']:5} {said}")
    for r in learnt:
        print(
            f"{r['model']:26} {r['precision']:5} training "
            + (
                r.get('failed')
                or f"{r['ratio']:.1f} times the usual loop, "
                f"{r['samples_a_second']['ours']:.1f} questions a second, losses {r['losses']}, peaks "
                + str({k: f'{v / 2**30:.2f} GiB' for k, v in r['peak_bytes'].items()})
            )
        )
    for r in rows:
        print(
            f"{r['model']:26} {r['task']:7} {r['precision']:5} "
            + (
                r.get('failed')
                or f"{r['peak_bytes'] / 2**30:7.3f} GiB measured, {100 * r['error']:+6.1f} % predicted"
            )
        )
    print(f'on {machine}' + ('; tiny shapes: no result' if tiny else ''))


if __name__ == '__main__':
    sys.exit(main())
