"""Train the embedded blip2-nano anew from the recipe and put it into the package (about 5 minutes): python
tests/make_nano.py"""

import json, shutil, sys, tempfile
from pathlib import Path

ASSET = Path(__file__).resolve().parents[1] / 'fada' / 'assets' / 'blip2-nano'


def probe():
    """A few phantoms of the recipe's data as answers and coarse grey levels: what tells whether the drawing code
    has changed"""
    from fada.clinical import DEMO_CATEGORIES
    from fada.models import NanoRecipe
    from fada.phantoms import make_phantom

    r = NanoRecipe()
    out = []
    for c in DEMO_CATEGORIES:
        ph = make_phantom(c, (r.data_seed, 3, 0), r.findings)
        out.append(
            dict(
                category=c,
                text=list(ph.text().values()),
                blocks=ph.image.reshape(8, 28, 8, 28).mean((1, 3)).round(2).tolist(),
            )
        )
    return out


def main():
    from fada.clinical import DEMO_CATEGORIES
    from fada.data import prepare
    from fada.models import NanoRecipe
    from fada.base import train_base

    r = NanoRecipe()
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        prepare(d / 'phantoms', r.phantoms, DEMO_CATEGORIES, seed=r.data_seed, workers=2)
        train_base(d / 'phantoms', d / 'model', r)
        shutil.rmtree(ASSET, ignore_errors=True)
        shutil.copytree(d / 'model', ASSET)
    (ASSET / 'probe.json').write_text(json.dumps(probe(), indent=1))
    for p in ASSET.iterdir():
        p.chmod(0o644)
    print(f'{ASSET}: {sum(p.stat().st_size for p in ASSET.iterdir()) / 1e6:.2f} MB', file=sys.stderr)


if __name__ == '__main__':
    main()
