"Voting and loading of several models together, where a wrong join would not be seen."

from dataclasses import replace
from fada.ensemble import load_ensemble, vote
from fada.registry import model_spec
from fada.settings import load_settings


def test_a_plane_is_voted_on_with_its_verdict():
    """Apart, the heaviest plane (A, 4 of 10) and the heaviest verdict (standard, 6 of 10) would be a pair at weight
    1"""
    said = [('A', True, 1), ('A', False, 3), ('B', True, 2.5), ('C', True, 2.5), ('B', False, 1)]
    out = vote(3, [(dict(plane=p, standard=s), w) for p, s, w in said])
    assert out == dict(plane='A', standard=False)
    said = [('A', False, 2), ('A', False, 1), ('B', True, 2), ('C', True, 2)]
    assert vote(3, [(dict(plane=p, standard=s), w) for p, s, w in said]) == dict(plane='A', standard=False)


def test_another_precision_than_asked_for_is_said(tmp_path, monkeypatch):
    "A part without bf16 is loaded in fp32, and one sentence says so; where it has it, nothing is said"
    monkeypatch.chdir(tmp_path)
    said = []
    (tmp_path / 'models.toml').write_text('[plain]\nlike = "blip2-nano"\nprecisions = ["fp32"]\n')
    (tmp_path / 'settings.ini').write_text('[model]\nname = plain\n')
    row = replace(model_spec('ensemble'), name='ours', parts=dict(others='plain'))
    e = load_ensemble(row, load_settings(tmp_path, precision='bf16', device='cpu'), said.append)
    assert e.precision == 'fp32' and said == ['plain of ours has no bf16 and is loaded in fp32']
    said.clear()
    load_ensemble(row, load_settings(tmp_path, precision='fp32', device='cpu'), said.append)
    assert said == []
