"An adapter learns a category that its base never saw, from the images and not from the answers alone."

import sys
import pytest


@pytest.mark.slow
def test_a_category_left_out_is_learned_from_images(tmp_path, root):
    """120 steps on 210 images of a plane that the embedded base does not know: better than the base, than the
    answers alone, than the same questions with another patient's picture of the same plane; 95 % intervals over
    patients above zero"""
    sys.path.insert(0, str(root / 'bench'))
    from adapts import shift

    f = shift('Trans-thalamic', False, tmp_path)
    assert f['patients'] >= 20 and f['gain']['low'] > 0.1, f['gain']
    for control in ('shuffled same', 'blank', 'majority in category', 'no image'):
        assert f['controls'][control]['low'] > 0, (control, f['controls'])
