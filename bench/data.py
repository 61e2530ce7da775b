"""Check, hash and table of a large folder, the table opened again, and cached pixels against decoding.

Two ratios from one run: cached pixels against decoding and resizing the same images, and what an image costs (CPU
time of all processes for check and table) in the whole folder against a tenth of it: 1 where cost stays flat.

    python bench/data.py --quick --json
"""

import argparse, functools, json, os, sys, tempfile, threading, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
import numpy as np
import psutil
from fada.checks import check
from fada.data import load_table, prepare
from fada.images import read_image
from fada.pixels import model_pixels, pixel_cache, processor_settings
from fada.settings import environment

CATEGORIES = ('Abdomen', 'Femur', 'Thorax', 'Trans-thalamic', 'Standard_NT')
HEADERS = ['Folder Name', 'Image Name', 'Patient', *(f'Q{q}: text' for q in range(1, 9))]


@functools.lru_cache
def sector():
    y, x = np.mgrid[:768, :1024]
    return ((np.hypot(y + 40, x - 512) < 760) & (abs(x - 512) < 0.8 * (y + 40))).astype(np.uint8)


def write(job):
    "One picture of 1024 × 768, a sector of smoothed speckle on coarse anatomy, and its row of the workbook"
    from PIL import Image

    folder, k = job
    rng = np.random.default_rng(k)
    c = CATEGORIES[k % 5]

    def grow(a, size):
        return np.asarray(Image.fromarray(a.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))

    small = rng.gamma(1.5, 40, (192, 256)) * grow(rng.gamma(1, 1, (6, 8)), (256, 192))
    im = grow(small.clip(0, 255), (1024, 768)).astype(np.uint8)
    Image.fromarray(im * sector()).save(Path(folder) / c / f'{k:05d}.png', compress_level=1)
    pick = lambda *a: a[rng.integers(len(a))]
    n = 8 if k % 2 else 7  # 150,000 answers for 20,000 images
    parts = ('aorta', 'liver', 'spine', 'stomach', 'ribs', 'heart', 'kidneys', 'umbilical vein')
    text = [
        ', '.join(sorted(set(rng.choice(parts, 4)))),
        f"spine {pick('left', 'right', 'up', 'down')}",
        pick('standard plane', 'non-standard plane'),
        pick('AC', 'FL', 'HC, BPD'),
        f'{rng.integers(14, 30)}-{rng.integers(30, 40)} weeks',
        pick('Good image quality', 'good', 'poor', 'moderate'),
        pick('Normal', 'no abnormality seen'),
        pick('routine', 'repeat'),
    ][:n]
    return [c, f'{k:05d}.png', f'P{k // 6}', *text]


class Peak(threading.Thread):
    "Largest memory of this process and its children together, sampled"

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.go = 0, True

    def run(self):
        me = psutil.Process()
        while self.go:
            total = 0
            for p in [me, *me.children(recursive=True)]:
                try:
                    m = p.memory_full_info()
                    total += getattr(m, 'pss', m.uss)  # shared pages counted once
                except psutil.Error:
                    pass
            self.peak = max(self.peak, total)
            time.sleep(0.5)


def make(folder, n, workers):
    "The folder, and a tenth of it as a folder of its own; returns the number of answers"
    for d in (folder, folder.with_name('tenth')):
        for c in CATEGORIES:
            (d / c).mkdir(parents=True)
    with ProcessPoolExecutor(workers, mp_context=get_context('spawn')) as pool:
        rows = list(pool.map(write, [(str(folder), k) for k in range(n)], chunksize=32))
    for r in rows[: n // 10]:
        os.link(folder / r[0] / r[1], folder.with_name('tenth') / r[0] / r[1])
    for d, some in ((folder, rows), (folder.with_name('tenth'), rows[: n // 10])):
        workbook(d / 'answers.xlsx', some)
    return sum(len(r) - 3 for r in rows)


def workbook(path, rows):
    from openpyxl import Workbook

    b = Workbook(write_only=True)
    ws = b.create_sheet('answers')
    for r in [HEADERS, *rows]:
        ws.append(r)
    b.save(path)


class Stage:
    "Wall and CPU seconds of a block, those of its finished child processes with them"

    def __enter__(self):
        self.wall, self.cpu = time.perf_counter(), sum(os.times()[:4])
        return self

    def __exit__(self, *a):
        self.wall, self.cpu = time.perf_counter() - self.wall, sum(os.times()[:4]) - self.cpu


def check_and_table(folder, workers):
    "{stage: Stage} of a cold check, and of the table made after it; with what the check took and set aside"
    with Stage() as checked:
        c = check(folder, workers=workers)
    taken, aside = len(c.table), int((c.findings.action == 'quarantined').sum())
    del c
    with Stage() as prepared:
        prepare(folder, 0, [], 0, workers, 'folder')
    return dict(check=checked, table=prepared), taken, aside


def cached_pixels(table, folder, where, workers):
    "Seconds to decode and resize 256 images, and to read them from the cache"
    clock = time.perf_counter
    some = table.drop_duplicates('image').head(256)
    s = processor_settings(224)
    cache = pixel_cache(some, folder, where, s, workers)
    batch = [some.iloc[i : i + 32] for i in range(0, len(some), 32)]
    t = clock()
    x = [np.stack([model_pixels(read_image(folder / r), s) for r in b.image]) for b in batch]
    decode = clock() - t
    t = clock()
    y = [cache.batch(b.pixels_sha256.tolist()) for b in batch]
    read = clock() - t
    assert all((i == j).all() for i, j in zip(x, y))
    return decode, read


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true', help='300 images instead of 20,000')
    p.add_argument('--images', type=int, help='another number of images')
    p.add_argument('--folder', help='where the folder is made (about 0.3 MB an image); default: a temporary one')
    p.add_argument('--json', action='store_true', help='one JSON document on standard output')
    a = p.parse_args()
    n = a.images or (300 if a.quick else 20_000)
    workers = 2
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    with tempfile.TemporaryDirectory(dir=a.folder) as d:
        folder = Path(d) / 'scans'
        with Stage() as made:
            answers = make(folder, n, workers)
        few, *_ = check_and_table(folder.with_name('tenth'), workers)
        peak = Peak()
        peak.start()
        cost, taken, aside = check_and_table(folder, workers)
        peak.go = False
        peak.join()
        assert taken + aside >= answers
        with Stage() as opened:
            table = load_table(folder)
        decode, read = cached_pixels(table, folder, Path(d) / 'cache', workers)
    ms = lambda stages, k: 1000 * sum(s.cpu for s in stages.values()) / k
    seconds = {k: dict(wall=s.wall, cpu=s.cpu) for k, s in dict(make=made, **cost, open=opened).items()}
    both = cost['check'].wall + cost['table'].wall
    out = dict(
        ratios={
            'reading cached pixels to decoding': decode / read,
            'CPU of an image in the whole folder to a tenth': ms(cost, n) / ms(few, n // 10),
        },
        baseline='decoding and resizing, one process; a tenth of the folder',
        images=n,
        answers=answers,
        taken=taken,
        set_aside=aside,
        seconds=seconds,
        check_and_table=both,
        cpu_ms_per_image=dict(tenth=ms(few, n // 10), whole=ms(cost, n)),
        peak_bytes=peak.peak,
        load=os.getloadavg(),
        machine={k: environment()[k] for k in ('system', 'machine', 'cores')},
        versions=environment(),
    )
    if a.json:
        print(json.dumps(out, indent=1))
    else:
        print(
            f"{n} images, {answers} answers: check {cost['check'].wall:.0f} s, "
            f"table {cost['table'].wall:.0f} s more ({ms(cost, n):.1f} ms of CPU an image; "
            f'{ms(few, n // 10):.1f} in a tenth of the folder), opened in {opened.wall:.2f} s, '
            f'peak {peak.peak / 2**30:.2f} GiB; cached pixels {decode / read:.0f} times faster than decoding'
        )


if __name__ == '__main__':
    sys.exit(main())
