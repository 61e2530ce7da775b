"""Does an adapter learn what its base has not seen, and does it look at the image while it does?

One fully trained base (the embedded nano) and shifts it never saw: a category left out of its training, and its own
five categories as another machine shows them (other grey-level curve, coarser picture, darker edges). Equal steps
for all. Scored on patients nobody trained on: gain over the untouched base, and the adapter against the same
questions with another patient's image of the same category, with no picture in it, and against the training split's
commonest answers; 95 % intervals over patients. The baseline is the untouched base.

Writes bench/results/adapts.json unless a part of it was asked for; the figures do not depend on the machine's
speed.

    FADA_THREADS=1 OMP_NUM_THREADS=1 python bench/adapts.py --quick --json
"""

import argparse, json, os, sys, tempfile, time
from pathlib import Path
import numpy as np
import pandas as pd
from fada.clinical import DEMO_CATEGORIES
from fada.data import prepare
from fada.evaluate import evaluate
from fada.finetune import finetune
from fada.metrics import difference
from fada.settings import environment, pixels_sha256, write_json
from fada.vlm import load

LEFT_OUT = ('Trans-thalamic', 'Cervix')
STEPS, IMAGES = 120, 300  # equal for all; images of all splits


def other_machine(folder):
    "Change every picture of a data folder as another machine would show it"
    from PIL import Image, ImageFilter

    p = folder / 'questions.parquet'
    t = pd.read_parquet(p)
    new = {}
    for name in t.image.unique():
        a = np.asarray(Image.open(folder / name).convert('L').filter(ImageFilter.GaussianBlur(1.2)), float) / 255
        h, w = a.shape
        y, x = np.mgrid[-1 : 1 : h * 1j, -1 : 1 : w * 1j]
        a = a**0.55 * (1 - 0.35 * (x**2 + y**2) / 2)
        im = Image.fromarray((a * 255).round().astype(np.uint8))
        im.save(folder / name)
        new[name] = pixels_sha256(im.convert('RGB'))
    t.assign(pixels_sha256=t.image.map(new)).to_parquet(p)


def shift(category: str, look: bool, folder, images: int = IMAGES, seed: int = 11) -> dict:
    "Train and score one shift: gain over the base, adapter against its controls"
    folder = Path(folder)
    start = time.perf_counter()
    prepare(folder / 'data', images, [category], seed=seed, workers=1, source='phantoms')
    if look:
        other_machine(folder / 'data')
    open_ = lambda adapter=None: load('blip2-nano', adapter, device='cpu', precision='fp32')
    about = finetune(open_(), folder / 'data', [category], folder / 'adapter', steps=STEPS)
    scored = {}
    for name, adapter in (('base', None), ('adapter', folder / 'adapter')):
        evaluate(open_(adapter), folder / 'data', folder / name, [category], control_images=images)
        scored[name] = pd.read_parquet(folder / name / 'scores.parquet')
    key = ['image', 'question_id']
    of = lambda n, c: scored[n][scored[n].condition == c].set_index(key).sort_index()
    mine = of('adapter', 'plain')

    def against(other):
        o = other.reindex(mine.index)
        return difference(mine.score, o.score, mine.patient)

    controls = {c: against(of('adapter', c)) for c in sorted(set(scored['adapter'].condition) - {'plain'})}
    return dict(
        category=category,
        shift='another machine' if look else 'left out',
        images=about['images'],
        patients=int(mine.patient.nunique()),
        base=float(of('base', 'plain').score.mean()),
        adapter=float(mine.score.mean()),
        gain=against(of('base', 'plain')),
        controls=controls,
        seconds=round(time.perf_counter() - start, 1),
    )


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true', help='one category left out, one category of another machine')
    p.add_argument('--json', action='store_true', help='one JSON document on standard output')
    p.add_argument('--only', help='categories, separated by commas')
    a = p.parse_args()
    os.environ.setdefault('FADA_QUIET', '1')
    todo = [(c, False) for c in LEFT_OUT] + [(c, True) for c in DEMO_CATEGORIES]
    if a.quick:
        todo = [todo[0], todo[2]]
    if a.only:
        todo = [(c, look) for c, look in todo if c in a.only.split(',')]
    found = []
    for c, look in todo:
        with tempfile.TemporaryDirectory() as d:
            found.append(shift(c, look, d))
        f = found[-1]
        line = lambda v: '' if v['low'] is None else f"{v['mean']:+.3f} [{v['low']:.3f}, {v['high']:.3f}]"
        if not a.json:
            print(
                f"{c}, {f['shift']}: base {f['base']:.3f}, adapter {f['adapter']:.3f}, gain {line(f['gain'])} ({f['patients']} patients, {f['seconds']:.0f} s)\n  adapter against "
                + '; '.join(f'{k} {line(v)}' for k, v in f['controls'].items()),
                flush=True,
            )
    e = environment()
    out = dict(
        ratios={f"{f['category']}, {f['shift']}": f['adapter'] / max(f['base'], 1e-9) for f in found},
        baseline='the untouched base',
        shifts=found,
        machine=f"{e['machine']} CPU, {e['cores']} cores",
        versions=e,
    )
    folder = Path(__file__).parent / 'results'
    if not (a.quick or a.only):
        folder.mkdir(exist_ok=True)
        write_json(folder / 'adapts.json', out)
    if a.json:
        print(json.dumps(out, indent=1))


if __name__ == '__main__':
    sys.exit(main())
