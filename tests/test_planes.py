"The supervised row beside every plane score learns, and says what it cannot do."

import json
import pandas as pd
import pytest
from fada.planes import train_planes
from fada.settings import FadaError


@pytest.mark.parametrize('architecture', ['plane-classifier'])
def test_answer(architecture, small_data, tmp_path):
    """Beats the commonest plane on other patients, keeps weights and answers, and repeats itself with the
    same seed"""
    a, b = (train_planes(small_data, ['Femur', 'Abdomen'], tmp_path / n, side=48, batch=16, seed=1) for n in 'ab')
    assert a['accuracy']['mean'] > a['majority']['mean'] + 0.1 and a['accuracy'] == b['accuracy']
    rows = pd.read_parquet(tmp_path / 'a' / 'planes.parquet')
    assert len(rows) == a['images'] and (rows.prediction == rows.answer).mean() <= a['accuracy']['mean'] <= 1
    assert json.loads((tmp_path / 'a' / 'metrics.json').read_text())['majority'] == a['majority']
    assert (tmp_path / 'a' / 'model.safetensors').read_bytes() == (tmp_path / 'b' / 'model.safetensors').read_bytes()


@pytest.mark.parametrize('architecture', ['plane-classifier'])
def test_train(architecture, small_data, tmp_path):
    "Through the training room: `fada train --task planes`"
    from fada.settings import load_settings
    from fada.finetune import train_job

    s = load_settings(data=str(small_data), categories='Femur,Abdomen')
    about = train_job(s, tmp_path / 'job', 'planes')
    assert about['method'] == 'cnn' and (tmp_path / 'job' / 'config.json').is_file()
    assert about['losses'][-1][1] < about['losses'][0][1]


def test_one_plane_is_nothing_to_tell_apart(tmp_path):
    from fada.data import prepare

    prepare(tmp_path / 'd', 12, ['Femur'], seed=2, workers=1, source='phantoms')
    with pytest.raises(FadaError, match='one plane only|no plane answers'):
        train_planes(tmp_path / 'd', ['Femur'], tmp_path / 'x')
