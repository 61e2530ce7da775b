"The registry against what the publishers say: names, parameter counts, rows of one's own."
import pytest
from fada.registry import MODELS, PUBLISHED, count_parameters, dossier, skeleton

NAMES = '''blip2-opt-2.7b blip2-opt-6.7b blip2-flan-t5-xl blip2-flan-t5-xxl instructblip-flan-t5-xl
instructblip-vicuna-7b medgemma-4b medgemma-4b-text blip2-medgemma-4b florence-2-base
florence-2-large llava-1.5-7b qwen2.5-vl-3b qwen2.5-vl-7b qwen3-vl-2b qwen3-vl-4b qwen3-vl-8b
internvl3.5-1b internvl3.5-4b smolvlm-256m smolvlm-500m gemma-3-4b paligemma2-3b openai
anthropic ensemble plane-classifier blip2-nano blip2-mini'''.split()

# Exact where the publisher's repository or a paper gives the exact number, else as rounded there: (figure,
# unit of rounding).
# Sources: model cards on the hub; Gemma 3 (arXiv:2503.19786); InternVL3.5 (arXiv:2508.18265, table of sizes).
SAID = {'blip2-opt-2.7b': (3_744_761_856, 1), 'blip2-opt-6.7b': (7.75e9, 1e7),
        'blip2-flan-t5-xl': (3.94e9, 1e7),
        'blip2-flan-t5-xxl': (12.2e9, 1e8), 'instructblip-flan-t5-xl': (4.02e9, 1e7),
        'instructblip-vicuna-7b': (7.91e9, 1e7), 'llava-1.5-7b': (7_063_427_072, 1),
        'medgemma-4b': (4_300_079_472, 1), 'gemma-3-4b': (4_300_079_472,
                                                          1), 'medgemma-4b-text': (3_880_263_168, 1),
        'qwen2.5-vl-3b': (3_754_622_976, 1), 'qwen2.5-vl-7b': (8.29e9, 1e7), 'qwen3-vl-2b': (2_127_532_032,
                1),
        'qwen3-vl-4b': (4.44e9, 1e7), 'qwen3-vl-8b': (8.77e9, 1e7), 'internvl3.5-1b': (1.1e9, 1e8),
        'internvl3.5-4b': (4.7e9, 1e8), 'smolvlm-256m': (256e6, 1e6), 'smolvlm-500m': (507e6, 1e6),
        'paligemma2-3b': (3.03e9, 1e7), 'florence-2-base': (231_414_784, 1), 'florence-2-large': (0.77e9,
                1e7),
        # encoder and Q-Former of BLIP-2, the text model of Gemma 3, and a projection of 768 × 2560 with bias
        'blip2-medgemma-4b': (985_952_256 + 105_162_240 + 3_880_263_168 + 769*2560, 1)}

def test_every_name_of_the_comparison_has_a_row_and_a_dossier():
    assert sorted(NAMES) == sorted(MODELS)
    for m in MODELS.values():
        d = dossier(m)
        assert d.strengths and d.weaknesses and d.source and d.share and d.suits, m.name

@pytest.mark.parametrize('name', PUBLISHED)
def test_parameters_as_published(name):
    "The published shape on the meta device counts what the publisher says, and the row says the same"
    counted = sum(count_parameters(skeleton(MODELS[name])).values()); said, unit = SAID[name]
    assert abs(counted-said) <= unit*(.5 if unit == 1 else 1), f'{counted:,} counted, {said:,} published'
    assert MODELS[name].parameters == counted

def test_the_whole_local_table_is_counted():
    "No local row escapes the count but two, whose weights are made here and counted where they are made"
    local = {m.name for m in MODELS.values() if m.architecture}
    assert local-set(PUBLISHED) == {'blip2-nano', 'blip2-mini'} and set(PUBLISHED) == set(SAID)

def test_licences_forbid_what_they_forbid():
    for name in ('blip2-opt-2.7b', 'qwen2.5-vl-3b', 'instructblip-vicuna-7b'):
        assert 'non-commercial' in MODELS[name].licence
    assert {m.name for m in MODELS.values() if m.gated} == {'medgemma-4b', 'medgemma-4b-text',
                                                            'blip2-medgemma-4b',
                                                           'gemma-3-4b', 'paligemma2-3b'}

def test_ticks_stand_for_tests():
    """The table of README is made of ticks.json, every tick names a test that is there; each architecture answers
    and trains"""
    import json, re
    from pathlib import Path
    from fada.registry import ARCHITECTURES, ASSETS
    from fada.trial import HEADING, tick_table
    root = Path(__file__).resolve().parents[1]; readme = (root/'README.md').read_text()
    assert tick_table() in readme, 'run python tests/ticks.py and make readme'
    assert HEADING == 'architecture tested with random weights; real weights: run `fada models test NAME`'
    found = set(re.findall(r'def (test_\w+)', (root/'tests/test_families.py').read_text()
                           +(root/'tests/test_planes.py').read_text()
                           +(root/'tests/test_remote.py').read_text()))
    ticks = json.loads((ASSETS/'ticks.json').read_text())['ticks']
    assert {t.split('[')[0] for by in ticks.values() for t in by.values()} <= found
    assert all({'answer', 'train', 'int8', 'nf4'} <= set(ticks[a]) for a in ARCHITECTURES)
