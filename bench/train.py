"""LoRA on images with eight questions each: FADA's loop against the usual one.

The baseline is what public scripts do: transformers' Trainer with peft, one question a sample, processor and vision
tower at every sample, rows padded to the longest. Same model, same weights, same LoRA layers, same rows a step, one
epoch; FADA's time holds the keeping of features. Runs alternate, the best of each counts. The loss before training
is that of both ways, or the comparison stops. FADA's linear layers take oneDNN where it is faster than torch's own
choice (see `fada.linears`), the usual loop runs as torch comes. Beside it: peak memory of one step, arithmetic done
against the machine's, cost and memory from 50 to 5,000 images.

Writes bench/results/train-<machine>.json unless --quick.

    FADA_THREADS=1 OMP_NUM_THREADS=1 python bench/train.py --quick --json
"""

import argparse, json, os, re, sys, tempfile, time
from pathlib import Path
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from engine import MODELS, limits, processor
from fada.loop import Fit, LoraRecipe, Material
from fada.memory import allocator_peak, resident_bytes
from fada.linears import onednn_gains
from fada.settings import environment, write_json
from fada.train import add_lora
from fada.vlm import build_prompt

STEP = 4  # images a step, with 8 questions each: 32 rows


def table_of(folder, n: int):
    "Question table of `n` phantoms, or of noise where there are to be many"
    import pandas as pd
    from PIL import Image
    from fada.clinical import QUESTIONS
    from fada.data import load_table, prepare

    if n <= 64:
        prepare(folder, n + 16, ['Femur', 'Abdomen'], seed=3, workers=1, source='phantoms')
        return load_table(folder, split='train')
    (folder / 'images').mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        Image.fromarray(rng.integers(0, 255, (112, 112), np.uint8)).save(folder / 'images' / f'{i}.png')
        rows += [
            dict(
                image=f'images/{i}.png',
                question_id=q,
                question=QUESTIONS[q].text,
                answer='longitudinal femoral plane, standard',
                structured=None,
                category='Femur',
            )
            for q in QUESTIONS
        ]
    return pd.DataFrame(rows)


# ---- the usual loop
class Samples:
    "One question a sample: picture, words to read, words to say"

    def __init__(self, vlm, folder, table):
        self.rows = [
            (Path(folder) / r.image, build_prompt(vlm.spec, r.question), r.answer) for r in table.itertuples()
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return dict(row=self.rows[i])


def collator(vlm):
    "Batches as the processor makes them, labels on the answer and its end"
    import torch
    from fada.data import read_image

    tok = getattr(vlm.processor, 'tokenizer', vlm.processor)
    chat = hasattr(vlm, 'render')
    tok.padding_side = 'right'  # on the left it would come between image and words

    def collate(batch):
        images = [read_image(r['row'][0]) for r in batch]
        words = [r['row'][1:] for r in batch]
        turns = [vlm.render(p, True, a) if chat else (p, ' ' + a + tok.eos_token) for p, a in words]
        t = vlm.processor(images=images, text=[p + s for p, s in turns], return_tensors='pt', padding=True)
        said = [len(tok(s, add_special_tokens=False)['input_ids']) for _, s in turns]
        labels = torch.full_like(t['input_ids'], -100)
        for i, (n, end) in enumerate(zip(said, t['attention_mask'].sum(1).tolist())):
            labels[i, end - n : end] = t['input_ids'][i, end - n : end]
        return dict(t, labels=labels)

    return collate


def usual(vlm, folder, table, rows: int = 8 * STEP, steps: int = -1):
    "One epoch of transformers' Trainer; seconds, and the loss of its first step"
    from transformers import Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as d:
        a = TrainingArguments(
            d,
            per_device_train_batch_size=rows,
            num_train_epochs=1,
            max_steps=steps,
            learning_rate=1e-4,
            report_to=[],
            save_strategy='no',
            logging_steps=1,
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            max_grad_norm=1.0,
        )
        t = Trainer(model=vlm.model, args=a, train_dataset=Samples(vlm, folder, table), data_collator=collator(vlm))
        t.log = lambda *x, **k: None
        start = time.perf_counter()
        t.train()
        return time.perf_counter() - start


# ---- FADA's
def ours(vlm, folder, table, batch: int = STEP, steps: int = None, **kw):
    "One epoch of the same rows, features kept anew; seconds of all, of keeping features"
    with tempfile.TemporaryDirectory() as d:
        recipe = LoraRecipe(lr=1e-4, batch=batch, **kw)
        start = time.perf_counter()
        m = Material(vlm, folder, table, recipe, Path(d) / 'f.npy')
        n = steps or -(-len(m) // batch)
        fit = Fit(vlm, recipe, m, m, '', d)
        vlm.core.train()
        _, parameters, _ = fit.phases()[-1]
        fit.begin(parameters, n)
        for fit.step in range(n):
            fit.take()
        vlm.core.eval()
        return time.perf_counter() - start, m.cache_seconds


def same_loss(vlm, folder, table) -> tuple:
    "Loss of the same rows in both ways before training"
    import torch

    few = table[table.image.isin(table.image.unique()[:2])]
    few = few[few.image.isin(few.image.unique())]
    with torch.no_grad(), tempfile.TemporaryDirectory() as d:
        a = float(Material(vlm, folder, few, LoraRecipe(), Path(d) / 'f.npy').loss([0, 1]))
        s = Samples(vlm, folder, few)
        b = float(vlm.model(**{k: v for k, v in collator(vlm)([s[i] for i in range(len(s))]).items()}).loss)
    return a, b


def run(name: str, images: int, times: int, memory: bool) -> dict:
    import warnings

    warnings.filterwarnings('ignore')
    vlm, _ = MODELS[name]()
    add_lora(vlm, 8)
    with tempfile.TemporaryDirectory() as d:
        table = table_of(Path(d) / 'data', images)
        folder = Path(d) / 'data'
        names = table.image.unique()[:images]
        table = table[table.image.isin(names)]
        a, b = same_loss(vlm, folder, table)
        rows = len(table)
        if abs(a - b) > 1e-3:
            raise SystemExit(f'{name}: losses of the two ways differ: {a} and {b}')
        best = dict(usual=np.inf, ours=np.inf, apart=np.inf)
        keep = 0.0
        for _ in range(times):
            best['usual'] = min(best['usual'], usual(vlm, folder, table))
            s, k = ours(vlm, folder, table)
            if s < best['ours']:
                best['ours'], keep = s, k
            best['apart'] = min(best['apart'], ours(vlm, folder, table, packing=False)[0])
        out = dict(
            images=len(names),
            rows=rows,
            loss=[a, b],
            seconds=best,
            keeping_seconds=keep,
            samples_a_second={k: rows / v for k, v in best.items()},
            ratio=best['usual'] / best['ours'],
            packing=best['apart'] / best['ours'],
            later_epochs=best['usual'] / (best['ours'] - keep),
            published_size_seconds=best['ours'] * 40 / rows,
        )
        if memory:
            few = table[table.image.isin(names[:STEP])]
            peaks = {}
            for way, f in (
                ('usual', lambda: usual(vlm, folder, few, steps=1)),
                ('ours', lambda: ours(vlm, folder, few, steps=1)),
            ):
                with allocator_peak('cpu') as p:
                    f()
                peaks[way] = p['bytes']
            out['peak_bytes_of_a_step'] = peaks
        out['arithmetic'] = arithmetic(vlm, folder, table, best['ours'] - keep)
        return out


def arithmetic(vlm, folder, table, seconds) -> dict:
    "Share of the machine's arithmetic that an epoch of steps reached: FLOP counted on one step"
    from torch.utils.flop_counter import FlopCounterMode

    few = table[table.image.isin(table.image.unique()[:STEP])]
    with tempfile.TemporaryDirectory() as d:
        m = Material(vlm, folder, few, LoraRecipe(), Path(d) / 'f.npy')
        with FlopCounterMode(display=False) as f:
            m.loss(list(range(len(m)))).backward()
    vlm.model.zero_grad()
    steps = -(-table.image.nunique() // STEP)
    done = f.get_total_flops() * steps / seconds / 1e9
    top = limits()
    return dict(gflops=done, machine_gflops=top['gflops'], share=done / top['gflops'])


def growth(sizes) -> dict:
    """Seconds an image, and the most memory held, of one epoch on the nano as images grow, each size in a process
    of its own"""
    import subprocess

    out = {}
    for n in sizes:
        r = subprocess.run([sys.executable, __file__, '--grow', str(n)], capture_output=True, text=True)
        if r.returncode:
            raise SystemExit(f'{n} images: {r.stderr[-400:]}')
        out[n] = json.loads(r.stdout)
    return out


def grow(n: int) -> dict:
    "One epoch of `n` images of noise"
    from fada.memory import peak_bytes

    vlm, _ = MODELS['nano']()
    add_lora(vlm, 8)
    with tempfile.TemporaryDirectory() as d:
        table = table_of(Path(d) / 'data', max(n, 65))
        table = table[table.image.isin(table.image.unique()[:n])]
        ours(vlm, Path(d) / 'data', table[table.image.isin(table.image.unique()[:16])], batch=16)
        before = resident_bytes()  # warm
        s, k = ours(vlm, Path(d) / 'data', table, batch=16)
    return dict(
        images=n,
        seconds=s,
        keeping_seconds=k,
        ms_an_image=1000 * s / n,
        before_mib=before / 2**20,
        peak_mib=peak_bytes() / 2**20,
    )


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true', help='few images, no curve of cost')
    p.add_argument('--json', action='store_true', help='one JSON document on standard output')
    p.add_argument('--out', help='folder of the result; default: bench/results, with --quick none')
    p.add_argument('--grow', type=int, help='one size of the curve of cost, as JSON')
    p.add_argument('--models', default='nano,mid,llava', help='of ' + ', '.join(MODELS) + '; mini needs its weights')
    a = p.parse_args()
    os.environ.setdefault('FADA_QUIET', '1')
    if a.grow:
        return print(json.dumps(grow(a.grow)))
    found = {
        n: run(n, dict(nano=32, mid=8, llava=4, mini=8)[n] * (1 if a.quick else 2), 2 if a.quick else 3, not a.quick)
        for n in a.models.split(',')
    }
    e = environment()
    grown = {} if a.quick else growth((50, 500, 5000))
    more = (
        {}
        if a.quick
        else {
            'cost of an image, 5,000 to 500': grown[5000]['ms_an_image'] / grown[500]['ms_an_image'],
            'memory, 5,000 to 50': grown[5000]['peak_mib'] / grown[50]['peak_mib'],
        }
    )
    out = dict(
        ratios={n: f['ratio'] for n, f in found.items()} | more,
        baseline="transformers' Trainer with peft, one question a sample, vision tower at every sample",
        models=found,
        growth=grown,
        library='oneDNN' if onednn_gains() else 'MKL',
        threads=int(os.environ.get('FADA_THREADS') or os.cpu_count()),
        machine=f"{processor()}, {e['cores']} cores",
        load_average=os.getloadavg() if hasattr(os, 'getloadavg') else None,
        versions=e,
    )
    folder = Path(a.out) if a.out else None if a.quick else Path(__file__).parent / 'results'
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        name = re.sub(r'\W+', '-', f"train {processor()} {e['cores']} cores {out['threads']} threads").strip('-')
        write_json(folder / f'{name}.json', out)
    if a.json:
        return print(json.dumps(out, indent=1))
    for n, f in found.items():
        print(
            f"{n:6} {f['ratio']:5.1f} times the usual loop ({f['samples_a_second']['ours']:.1f} against {f['samples_a_second']['usual']:.1f} questions a second; "
            f"packing {f['packing']:.2f} of it, later epochs {f['later_epochs']:.1f}); {f['arithmetic']['share']:.0%} of the machine's arithmetic"
            + (
                f"; a step holds {f['peak_bytes_of_a_step']['ours'] / 2**20:.0f} MiB against {f['peak_bytes_of_a_step']['usual'] / 2**20:.0f}"
                if 'peak_bytes_of_a_step' in f
                else ''
            )
        )
    for n, g in out['growth'].items():
        print(f"  {n} images: {g['ms_an_image']:.1f} ms an image, at most {g['peak_mib']:.0f} MiB")


if __name__ == '__main__':
    sys.exit(main())
