"""Check, hash and table of a large folder, the table opened again, and cached pixels against decoding.

The baseline of the ratio is decoding and resizing the same images in the same run.

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
from fada.images import look, read_image
from fada.pixels import model_pixels, pixel_cache, processor_settings
from fada.settings import environment

CATEGORIES = ('Abdomen', 'Femur', 'Thorax', 'Trans-thalamic', 'Standard_NT')
HEADERS = ['Folder Name', 'Image Name', 'Patient', *(f'Q{q}: text' for q in range(1, 9))]

@functools.lru_cache
def sector():
    y, x = np.mgrid[:768, :1024]
    return ((np.hypot(y+40, x-512) < 760) & (abs(x-512) < .8*(y+40))).astype(np.uint8)

def write(job):
    "One picture of 1024 × 768 with a sector of smoothed speckle, and its row of the workbook"
    from PIL import Image
    folder, k = job; rng = np.random.default_rng(k); c = CATEGORIES[k % 5]
    small = rng.gamma(1.5, 30, (192, 256)).astype(np.float32)
    im = np.asarray(Image.fromarray(small.clip(0, 255).astype(np.uint8)).resize((1024, 768),
        Image.Resampling.BILINEAR))
    Image.fromarray(im*sector()).save(Path(folder)/c/f'{k:05d}.png', compress_level=1)
    pick = lambda *a: a[rng.integers(len(a))]
    n = 8 if k % 2 else 7                      # 150,000 answers for 20,000 images
    parts = ('aorta', 'liver', 'spine', 'stomach', 'ribs', 'heart', 'kidneys', 'umbilical vein')
    text = [', '.join(sorted(set(rng.choice(parts, 4)))), f"spine {pick('left', 'right', 'up', 'down')}",
        pick('standard plane', 'non-standard plane'),
            pick('AC', 'FL', 'HC, BPD'), f'{rng.integers(14, 30)}-{rng.integers(30, 40)} weeks',
            pick('Good image quality', 'good', 'poor', 'moderate'),
            pick('Normal', 'no abnormality seen'), pick('routine', 'repeat')][:n]
    return [c, f'{k:05d}.png', f'P{k//6}', *text]

class Peak(threading.Thread):
    "Largest memory of this process and its children together, sampled"
    def __init__(self): super().__init__(daemon=True); self.peak, self.go = 0, True
    def run(self):
        me = psutil.Process()
        while self.go:
            total = 0
            for p in [me, *me.children(recursive=True)]:
                try: m = p.memory_full_info(); total += getattr(m, 'pss', m.uss)   # shared pages counted once
                except psutil.Error: pass
            self.peak = max(self.peak, total); time.sleep(.5)

def make(folder, n, workers):
    from openpyxl import Workbook
    for c in CATEGORIES: (folder/c).mkdir(parents=True)
    with ProcessPoolExecutor(workers, mp_context=get_context('spawn')) as pool:
        rows = list(pool.map(write, [(str(folder), k) for k in range(n)], chunksize=32))
    b = Workbook(write_only=True); ws = b.create_sheet('answers')
    for r in [HEADERS, *rows]: ws.append(r)
    b.save(folder/'answers.xlsx'); return sum(len(r)-3 for r in rows)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true', help='300 images instead of 20,000')
    p.add_argument('--images', type=int, help='another number of images')
    p.add_argument('--folder',
        help='where the folder is made (about 0.3 MB an image); default: a temporary one')
    p.add_argument('--json', action='store_true', help='one JSON document on standard output')
    a = p.parse_args(); n = a.images or (300 if a.quick else 20_000); workers = 2
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    with tempfile.TemporaryDirectory(dir=a.folder) as d:
        folder = Path(d)/'scans'; clock = time.perf_counter; t = clock(); answers = make(folder, n, workers)
        made = clock()-t
        peak = Peak(); peak.start(); t = clock(); c = check(folder, workers=workers); checked = clock()-t
        taken, aside = len(c.table), int((c.findings.action == 'quarantined').sum()); del c
        t = clock(); prepare(folder, 0, [], 0, workers, 'folder'); prepared = clock()-t; peak.go = False
        peak.join()
        t = clock(); table = load_table(folder); opened = clock()-t
        some = table.drop_duplicates('image').head(256); s = processor_settings(224)
        t = time.process_time()   # what a core does for an image: beside the wall time, for a busy machine
        for n_ in some.image.head(60): look(folder/n_)
        cpu = (time.process_time()-t)/min(60, len(some))
        cache = pixel_cache(some, folder, Path(d)/'cache', s, workers)
        batch = [some.iloc[i:i+32] for i in range(0, len(some), 32)]
        t = clock(); x = [np.stack([model_pixels(read_image(folder/r), s) for r in b.image]) for b in batch]
        decode = clock()-t
        t = clock(); y = [cache.batch(b.pixels_sha256.tolist()) for b in batch]; read = clock()-t
        assert all((i == j).all() for i, j in zip(x, y)) and taken + aside >= answers
    out = dict(ratios={'reading cached pixels to decoding': decode/read},
        baseline='decoding and resizing, one process', images=n,
               answers=answers, taken=taken, set_aside=aside, seconds=dict(make=made, check=checked,
               prepare_again=prepared, open=opened,
               both=checked+prepared), images_per_second=n/checked, peak_bytes=peak.peak,
               cpu_seconds_per_image=cpu,
               machine={k: environment()[k] for k in ('system', 'machine', 'cores')}, versions=environment())
    if a.json: print(json.dumps(out, indent=1))
    else:
        print(f'{n} images, {answers} answers: check {checked:.0f} s, table {prepared:.0f} s more, opened in {opened:.2f} s, '
              f'peak {peak.peak/2**30:.2f} GiB; cached pixels {decode/read:.0f} times faster than decoding')

if __name__ == '__main__': sys.exit(main())
