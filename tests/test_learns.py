"The embedded base looks at the image: it beats its controls on phantoms that it never saw."

import pytest
from fada.compare import beats_controls
from fada.data import prepare
from fada.clinical import DEMO_CATEGORIES
from fada.evaluate import evaluate
from fada.vlm import load


@pytest.mark.slow
def test_base_beats_every_control(tmp_path):
    """Pooled on structures, plane and biometry; within each category on two of structures, orientation and quality;
    95 % intervals above zero"""
    prepare(tmp_path / 'phantoms', 1500, DEMO_CATEGORIES, seed=4, workers=2)
    m = evaluate(load('blip2-nano'), tmp_path / 'phantoms', tmp_path / 'job', control_images=1500)
    assert m['coverage']['failed'] == 0 and m['patients'] >= 40
    missed = [q for q in (1, 3, 4) if not beats_controls(m['questions'][q], folder_known=False)]
    assert not missed, {q: m['questions'][q]['differences'] for q in missed}
    for c, by in m['by_category'].items():
        good = [q for q in (1, 2, 6) if beats_controls(by[q], folder_known=True)]
        assert len(good) >= 2, (c, {q: by[q]['differences'] for q in (1, 2, 6)})
