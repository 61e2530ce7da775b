"When a trained base is stale: a change of any code that decides it is seen."

import shutil
from pathlib import Path
import pytest
from fada import base, settings


@pytest.mark.parametrize(
    'start',
    [
        'def take_step(',
        'def rarity(',
        'def load_pixels(',
        'def vision_features(',
        'def question_rows(',
        'def train_answers(',
        'def mirror_text(',
        'NEAR,FAR =',
        'MAP =',
        'def build_nano(',
    ],
)
def test_a_change_of_what_decides_a_base_changes_its_digest(start, tmp_path, monkeypatch):
    before = settings.code_digest(base.DECIDING)
    for m in base.DECIDING:
        shutil.copy(Path(settings.__file__).with_name(f'{m}.py'), tmp_path)
    monkeypatch.setattr(settings, '__file__', str(tmp_path / 'settings.py'))
    assert settings.code_digest(base.DECIDING) == before  # the same code elsewhere
    [at] = [p for p in tmp_path.glob('*.py') if f'\n{start}' in p.read_text()]
    at.write_text(at.read_text().replace(f'\n{start}', f'\n\n{start}'))
    assert settings.code_digest(base.DECIDING) != before


def test_a_base_says_by_which_code_it_was_trained(tmp_path):
    "And is not trained again while data, recipe and code stay the same; it is where the code was another"
    from fada.data import prepare
    from fada.models import NanoRecipe
    from fada.settings import read_json, write_json

    prepare(tmp_path / 'data', 24, ['Femur'], seed=1, source='phantoms')
    recipe = NanoRecipe(views=1, vision_steps=1, answer_steps=1, answer_batch=4, vision_batch=8)
    train = lambda: base.train_base(tmp_path / 'data', tmp_path / 'base', recipe)
    about = train()
    assert about['code_sha256'] == settings.code_digest(base.DECIDING)
    note = tmp_path / 'base' / 'fada.json'
    write_json(note, dict(read_json(note), seen_again=True))
    assert train()['seen_again']
    write_json(note, dict(read_json(note), code_sha256='of older code'))
    assert 'seen_again' not in train()
