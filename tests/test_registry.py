"The registry against what the publishers say: names, parameter counts, rows of one's own."

import pytest
from fada.registry import MODELS, PUBLISHED, count_parameters, dossier, skeleton

NAMES = '''blip2-opt-2.7b blip2-opt-6.7b blip2-flan-t5-xl blip2-flan-t5-xxl instructblip-flan-t5-xl
instructblip-vicuna-7b medgemma-4b medgemma-4b-text blip2-medgemma-4b florence-2-base
florence-2-large llava-1.5-7b qwen2.5-vl-3b qwen2.5-vl-7b qwen3-vl-2b qwen3-vl-4b qwen3-vl-8b
internvl3.5-1b internvl3.5-4b smolvlm-256m smolvlm-500m gemma-3-4b paligemma2-3b openai
anthropic ensemble plane-classifier blip2-nano blip2-mini'''.split()

# What the publishers say, and to what it is rounded there: exact counts of the checkpoints' safetensors, else the
# figure of
# the hub's model page or of the table of sizes in the paper (InternVL3.5: arXiv:2508.18265; Florence-2:
# arXiv:2311.06242;
# Gemma 3: arXiv:2503.19786). Nothing here was read off the code under test.
EXACT = {
    'blip2-opt-2.7b': 3_744_761_856,
    'llava-1.5-7b': 7_063_427_072,
    'medgemma-4b': 4_300_079_472,
    'gemma-3-4b': 4_300_079_472,
    'medgemma-4b-text': 3_880_263_168,
    'qwen2.5-vl-3b': 3_754_622_976,
    'qwen3-vl-2b': 2_127_532_032,
    'florence-2-base': 231_414_784,
}
ROUNDED = {
    'blip2-opt-6.7b': (7.75e9, 1e7),
    'blip2-flan-t5-xl': (3.94e9, 1e7),
    'blip2-flan-t5-xxl': (12.2e9, 1e8),
    'instructblip-flan-t5-xl': (4.02e9, 1e7),
    'instructblip-vicuna-7b': (7.91e9, 1e7),
    'qwen2.5-vl-7b': (8.29e9, 1e7),
    'qwen3-vl-4b': (4.44e9, 1e7),
    'qwen3-vl-8b': (8.77e9, 1e7),
    'internvl3.5-1b': (1.1e9, 1e8),
    'internvl3.5-4b': (4.7e9, 1e8),
    'smolvlm-256m': (256e6, 1e6),
    'smolvlm-500m': (507e6, 1e6),
    'paligemma2-3b': (3.03e9, 1e7),
    'florence-2-large': (0.77e9, 1e7),
}
# OPT-2.7B by its paper's shape (arXiv:2205.01068): 32 layers of width 2,560, 50,272 words, 2,050 positions; weights
# and
# biases of attention, feed-forward and two norms, and the last norm
OPT_2_7B = (
    (50_272 + 2_050) * 2560 + 32 * (4 * (2560**2 + 2560) + 2 * 2560 * 10240 + 10240 + 2560 + 4 * 2560) + 2 * 2560
)
BRIDGE = 769 * 2560  # Q-Former's 768 to the language model's 2,560, with bias
# BLIP-2's eyes are what its checkpoint holds besides OPT (with 32 rows for new words) and the bridge
EYES = EXACT['blip2-opt-2.7b'] - (OPT_2_7B + 32 * 2560) - BRIDGE
EXACT['blip2-medgemma-4b'] = EYES + EXACT['medgemma-4b-text'] + BRIDGE
SAID = {**{k: (v, 1) for k, v in EXACT.items()}, **ROUNDED}


def test_every_name_of_the_comparison_has_a_row_and_a_dossier():
    assert sorted(NAMES) == sorted(MODELS)
    for m in MODELS.values():
        d = dossier(m)
        assert d.strengths and d.weaknesses and d.source and d.share and d.suits, m.name


@pytest.mark.parametrize('name', PUBLISHED)
def test_parameters_as_published(name):
    "The published shape on the meta device counts what the publisher says, and the row says the same"
    counted = sum(count_parameters(skeleton(MODELS[name])).values())
    said, unit = SAID[name]
    assert abs(counted - said) <= unit * (0.5 if unit == 1 else 1), f'{counted:,} counted, {said:,} published'
    assert MODELS[name].parameters == counted


def test_composed_medgemma_at_its_true_shape():
    """BLIP-2's encoder and Q-Former joined to MedGemma's language model by the code that composes the real one, on
    the meta device: counted part by part, and run from pixels to logits"""
    import torch
    from fada.compose import compose
    from fada.vlm import bridge

    eyes, words = skeleton(MODELS['blip2-opt-2.7b']), skeleton(MODELS['medgemma-4b-text'])
    m = compose(eyes.vision_model, words, 262_144, (eyes.qformer, eyes.query_tokens))
    parts = count_parameters(m)
    assert parts['vision_model'] + parts['qformer'] == EYES and parts['projection'] == BRIDGE
    assert parts['language_model'] == EXACT['medgemma-4b-text']
    assert sum(parts.values()) == MODELS['blip2-medgemma-4b'].parameters == EXACT['blip2-medgemma-4b']
    meta = lambda *shape, **kw: torch.empty(*shape, device='meta', **kw)
    with torch.no_grad():
        patches = m.vision_model(meta(2, 3, 224, 224)).last_hidden_state
        q = m.qformer(query_embeds=m.query_tokens.expand(2, -1, -1), encoder_hidden_states=patches).last_hidden_state
        asked = m.get_input_embeddings()(meta(2, 7, dtype=torch.long))
        logits = m.language_model(inputs_embeds=torch.cat([bridge(m, q), asked], 1)).logits
    assert patches.shape == (2, 257, 1408) and logits.shape == (2, 32 + 7, 262_208)


def test_the_whole_local_table_is_counted():
    "No local row escapes the count but two, whose weights are made here and counted where they are made"
    local = {m.name for m in MODELS.values() if m.architecture}
    assert local - set(PUBLISHED) == {'blip2-nano', 'blip2-mini'} and set(PUBLISHED) == set(SAID)


def test_licences_forbid_what_they_forbid():
    for name in ('blip2-opt-2.7b', 'qwen2.5-vl-3b', 'instructblip-vicuna-7b'):
        assert 'non-commercial' in MODELS[name].licence
    assert {m.name for m in MODELS.values() if m.gated} == {
        'medgemma-4b',
        'medgemma-4b-text',
        'blip2-medgemma-4b',
        'gemma-3-4b',
        'paligemma2-3b',
    }


def test_ticks_stand_for_tests():
    """The table of README is made of ticks.json, every tick names a test that is there; each architecture answers
    and trains"""
    import json, re
    from pathlib import Path
    from fada.registry import ARCHITECTURES, ASSETS
    from fada.trial import HEADING, tick_table

    root = Path(__file__).resolve().parents[1]
    assert tick_table() in (root / 'README.md').read_text(), 'run python tests/ticks.py and make readme'
    assert HEADING == 'architecture tested with random weights; real weights: run `fada models test NAME`'
    found = set(
        re.findall(
            r'def (test_\w+)',
            (root / 'tests/test_families.py').read_text()
            + (root / 'tests/test_planes.py').read_text()
            + (root / 'tests/test_remote.py').read_text(),
        )
    )
    ticks = json.loads((ASSETS / 'ticks.json').read_text())['ticks']
    assert {t.split('[')[0] for by in ticks.values() for t in by.values()} <= found
    assert all({'answer', 'train', 'int8', 'nf4'} <= set(ticks[a]) for a in ARCHITECTURES)


ROW = dict(
    like='smolvlm-256m',
    checkpoint='group/ours',
    precisions=['bf16', 'nf4'],
    tiles=17,
    gated=True,
    prompt='{question} Answer briefly: 100 %.',
)
TOML = """[ours]
like = "smolvlm-256m"
checkpoint = "group/ours"
precisions = ["bf16", "nf4"]
tiles = 17
gated = true
prompt = "{question} Answer briefly: 100 %."
"""
INI = """[ours]
like = smolvlm-256m
checkpoint = group/ours
precisions = bf16, nf4
tiles = 17
gated = yes
prompt = {question} Answer briefly: 100 %.
"""


@pytest.mark.parametrize('name,text', [('models.toml', TOML), ('models.ini', INI)])
def test_a_row_of_ones_own(name, text, tmp_path, monkeypatch):
    "TOML or INI beside settings.ini, no code: the same row, listed beside the built-in ones"
    from fada.registry import model_spec, registry

    (tmp_path / 'settings.ini').touch()
    (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    own, base = model_spec('ours'), MODELS['smolvlm-256m']
    assert {k: getattr(own, k) for k in ROW if k not in ('like', 'precisions')} == {
        k: v for k, v in ROW.items() if k not in ('like', 'precisions')
    }
    assert own.precisions == ('bf16', 'nf4') and own.lora == base.lora and own.architecture == base.architecture
    assert set(registry()) == {*MODELS, 'ours'} and dossier(own).share.startswith('see its licence')


def test_a_row_has_the_dossier_of_the_row_it_is_like(tmp_path, monkeypatch):
    "Not that of the first row of its architecture: MedGemma is built like Gemma 3"
    from fada.registry import model_spec

    (tmp_path / 'settings.ini').touch()
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'models.toml').write_text(''.join(f'["our-{n}"]\nlike = "{n}"\n' for n in MODELS))
    for n in MODELS:
        own, known = dossier(model_spec(f'our-{n}')), dossier(MODELS[n])
        assert own.strengths == known.strengths and own.suits == known.suits and own.issues == known.issues
        assert own.published == () and own.share != known.share


@pytest.mark.parametrize(
    'text,says',
    [
        ('[ours]\nlike = "smolvlm-256"\n', 'like = .smolvlm-256.'),
        ('[ours]\ncheckpoint = "x/y"\n', 'like = None'),
        ('[ours]\nlike = "llava-1.5-7b"\ntiles = 4\n', 'a model of smolvlm or internvl'),
        ('[ours]\nlike = "smolvlm-256m"\ntiles = 0\n', '1 or more'),
        ('[ours]\nlike = "smolvlm-256m"\ntiles = "many"\n', 'a value of type int'),
        ('[ours]\nlike = "smolvlm-256m"\nprecisions = ["int4"]\n', 'int4.*did you mean'),
        ('[ours]\nlike = "smolvlm-256m"\narchitecture = "gpt"\n', 'architecture = .gpt'),
        ('["org/model"]\nlike = "openai"\n', "'org/model' as the name of a row"),
        ('["../x"]\nlike = "openai"\n', "'../x' as the name of a row"),
        ('[".."]\nlike = "openai"\n', 'name of a row'),
        ('ours = 3\n', 'outside a table'),
        ('[ours\n', 'not valid TOML'),
    ],
)
def test_a_row_that_cannot_be(text, says, tmp_path):
    "File, row and field are named"
    from fada.registry import own_models
    from fada.settings import FadaError

    (tmp_path / 'settings.ini').touch()
    (tmp_path / 'models.toml').write_text(text)
    with pytest.raises(FadaError, match=says) as e:
        own_models(tmp_path)
    assert 'models.toml' in str(e.value)
