"""Do the stored calipers agree with what the picture shows?
Sizes read again from grey levels and scale alone.

200 seeds a parameter (60 with --quick) at 0.15 mm a pixel, of which the standard pictures of good quality
are measured; agreement is 2 mm or 5 %, for the nuchal translucency 0.3 mm. The baseline is the caliper.

    python bench/measure.py --quick --json
"""

import argparse, json, os, sys

os.environ.setdefault('OMP_NUM_THREADS', '1')
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
import numpy as np
from fada.measure import MEASURED, allowed, measure
from fada.memory import peak_bytes
from fada.phantoms import make_draft, make_native
from fada.settings import FadaError, environment, progress


def one(job):
    """(true, read) in mm; None where the picture is not standard or not good;
    read is None where nothing was found"""
    parameter, k = job
    seed = (31, k, 0)
    if make_draft(MEASURED[parameter], seed, 0.0)[0].grade != 'good':
        return None
    ph = make_native(MEASURED[parameter], seed)
    if not ph.answers[3]['standard']:
        return None
    try:
        return ph.sizes[parameter], measure(ph.image, ph.mm_per_px, parameter).mm
    except FadaError:
        return ph.sizes[parameter], None


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true', help='60 seeds a parameter instead of 200')
    p.add_argument('--json', action='store_true', help='one JSON document on standard output')
    a = p.parse_args()
    n = 60 if a.quick else 200
    rows = {}
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context('spawn')) as pool:
        for parameter in progress(list(MEASURED), 'parameters'):
            pairs = [r for r in pool.map(one, [(parameter, i) for i in range(n)], chunksize=4) if r]
            off = np.array([np.nan if r is None else r - t for t, r in pairs])
            agree = [bool(abs(o) <= allowed(parameter, t)) for o, (t, _) in zip(off, pairs)]
            rows[parameter] = dict(
                seeds=n,
                n=len(pairs),
                agree=float(np.mean(agree)),
                found=float(np.mean(~np.isnan(off))),
                median_mm=float(np.nanmedian(off)),
                p95_mm=float(np.nanpercentile(np.abs(off), 95)),
            )
    out = dict(
        ratios={f'{p} in agreement': r['agree'] for p, r in rows.items()},
        baseline='the stored caliper',
        rows=rows,
        peak_bytes=peak_bytes(),
        machine={k: environment()[k] for k in ('system', 'machine', 'cores')},
        versions=environment(),
    )
    if a.json:
        print(json.dumps(out, indent=1))
    else:
        for p, r in rows.items():
            print(
                f"{p:16} {100 * r['agree']:5.1f} % of {r['n']} agree; median {r['median_mm']:+.2f} mm, "
                f"95 % within {r['p95_mm']:.2f} mm"
            )


if __name__ == '__main__':
    sys.exit(main())
