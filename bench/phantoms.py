"""Phantoms per second on one and on two processes, and where the time of one goes.

The baseline is one process. Images are made, not written, so that the disk plays no part.

    python bench/phantoms.py --quick --json
"""

import argparse, json, os, sys, time

os.environ.setdefault('OMP_NUM_THREADS', '1')  # two processes, two cores
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from fada.clinical import PHANTOM_CATEGORIES
from fada.memory import peak_bytes
from fada.phantom import Picture, grey, scan_convert, simulate
from fada.phantoms import make_draft, make_phantom, visible
from fada.scenes import draw
from fada.settings import environment


def one(job):
    return make_phantom(*job).image.shape[0]


def stages(n):
    "Seconds a picture by stage, drawn, imaged and converted separately"
    t = dict(scene=0.0, echo=0.0, picture=0.0, answers=0.0)
    for i in range(n):
        plan = make_draft(PHANTOM_CATEGORIES[i % 14], (1, i, 0))[0].plan
        a = time.perf_counter()
        s = draw(plan)
        b = time.perf_counter()
        db = simulate(s.medium)
        d = time.perf_counter()
        pic = Picture(s.medium.probe, view=s.view)
        im = scan_convert(grey(db), pic)
        lab = scan_convert(s.medium.labels, pic, 0)
        e = time.perf_counter()
        visible(im.astype('uint8'), lab, s.medium.names)
        for k, v in zip(t, (b - a, d - b, e - d, time.perf_counter() - e)):
            t[k] += v / n
    return t


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true', help='56 images instead of 420')
    p.add_argument('--json', action='store_true', help='one JSON document on standard output')
    a = p.parse_args()
    n = 56 if a.quick else 420
    jobs = [(PHANTOM_CATEGORIES[i % 14], (1, i // 28, i // 14 % 2)) for i in range(n)]
    rate = {}
    for w in (1, 2):
        with ProcessPoolExecutor(w, mp_context=get_context('spawn')) as pool:
            list(pool.map(one, jobs[: w * 5]))
            t = time.perf_counter()
            list(pool.map(one, jobs, chunksize=5))
            rate[w] = n / (time.perf_counter() - t)
    share = stages(28 if a.quick else 84)
    out = dict(
        ratios={'two processes to one': rate[2] / rate[1]},
        baseline='one process',
        images_per_second=rate,
        seconds_by_stage=share,
        peak_bytes=peak_bytes(),
        machine={k: environment()[k] for k in ('system', 'machine', 'cores')},
        versions=environment(),
    )
    if a.json:
        print(json.dumps(out, indent=1))
    else:
        print(
            f"{rate[1]:.1f} images a second on one process, {rate[2]:.1f} on two "
            f"({rate[2] / rate[1]:.2f} times); ms a draw: "
            + ', '.join(f'{k} {1000 * v:.0f}' for k, v in share.items())
        )


if __name__ == '__main__':
    sys.exit(main())
