"""Result sets made from phantoms by code: each with one planted fault, which the audit must name, and clean ones,
of which it must say nothing."""

import json, subprocess
import numpy as np
import pandas as pd
import pytest
from commands import typed
from fada.answers import read_answers
from fada.audit import SEVERITIES, audit, open_results
from fada.clinical import phrase_answer
from fada.controls import donors
from fada.data import load_table, read_phantoms, save_table, split_by_patient
from fada.phantoms import write_phantoms
from fada.settings import FadaError

NAMES = ('Abdomen', 'Femur', 'Thorax')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """180 phantoms, half of them for testing; a third of the fetuses with a finding, half of the pictures with
    scale or dates"""
    folder = tmp_path_factory.mktemp('audit') / 'phantoms'
    write_phantoms(folder, 180, NAMES, seed=11, findings=0.4, workers=2, overlays=0.6)
    save_table(split_by_patient(read_phantoms(folder), 11, (0.4, 0.1, 0.5)), folder, 'phantoms', 11)
    return folder


def honest(data, seed=0, right=0.92):
    "Answers of a system that is mostly right in words of its own, and that knows nothing without the image"
    table = load_table(data)
    test = table[table.split == 'test']
    rng = np.random.default_rng(seed)
    out = []
    train = table[table.split == 'train'].groupby(['category', 'question_id']).structured.apply(list)
    images = test.drop_duplicates('image')
    truth = test.set_index(['image', 'question_id']).structured
    shown = {
        'plain': {i: i for i in images.image},
        'blank': dict.fromkeys(images.image),
        'no image': dict.fromkeys(images.image),
        **{
            f'shuffled {k}': {i: d for i, (d, _) in donors(images, images, same, seed).items()}
            for k, same in (('same', True), ('other', False))
        },
    }
    for condition, of in shown.items():
        for r in test.itertuples():
            if r.image not in of:
                continue
            pool = train[r.category, r.question_id] if of[r.image] else train[NAMES[rng.integers(3)], r.question_id]
            s = (
                truth[of[r.image], r.question_id]
                if of[r.image] and rng.random() < right
                else pool[rng.integers(len(pool))]
            )
            known = json.loads(truth[r.image, r.question_id])  # it may be wrong, but makes nothing up
            if condition == 'plain' and not (known.get('weeks') or known.get('mm')) and r.question_id in (4, 5):
                s = json.dumps(known)
            if (
                condition == 'plain'
                and r.question_id == 7
                and {'short femur', 'small abdomen'} & set(json.loads(s)['findings'])
            ):
                s = json.dumps(known)
            out.append(
                dict(
                    image=r.image,
                    category=r.category,
                    question_id=r.question_id,
                    question=r.question,
                    condition=condition,
                    model='ours',
                    prediction=phrase_answer(r.question_id, json.loads(s), int(rng.integers(3))),
                )
            )
    return pd.DataFrame(out)


def write(frame, path):
    path.write_text(''.join(json.dumps(r) + '\n' for r in frame.to_dict('records')))
    return path


def findings(path, data, near=True):
    return audit(open_results(path, data)[0], near)


def loud(found):
    return {f.id for f in found if f.severity != 'green'}


def nested(frame, path):
    "The nested shape, images by file name, questions by number"
    plain = frame[frame.condition == 'plain']
    path.write_text(
        json.dumps(
            {
                i.split('/')[-1]: dict(
                    category=g.category.iloc[0],
                    questions=[dict(question=f'Q{r.question_id}', response=r.prediction) for r in g.itertuples()],
                )
                for i, g in plain.groupby('image')
            }
        )
    )
    return path


def table_csv(frame, path):
    frame.rename(columns=dict(image='Image Name', category='Folder Name', prediction='Response')).to_csv(
        path, index=False, sep=';'
    )
    return path


@pytest.mark.parametrize('shape,seed', [(write, 0), (table_csv, 1), (nested, 2)], ids=['log', 'table', 'nested'])
def test_clean_results_are_quiet(shape, seed, data, tmp_path):
    found = findings(
        shape(
            honest(data, seed), tmp_path / f'a.{dict(write="jsonl", table_csv="csv", nested="json")[shape.__name__]}'
        ),
        data,
    )
    assert not loud(found), [f for f in found if f.severity != 'green']
    assert {'coverage', 'survives-without-image', 'leaks', 'not-read'} <= {f.id for f in found}


def plain(a, q=None):
    return (a.condition == 'plain') & (True if q is None else a.question_id == q)


def errors(a, rng):
    a.loc[plain(a) & (rng.random(len(a)) < 0.1), 'prediction'] = 'RuntimeError: CUDA out of memory'
    return a


def same_without_image(a, rng):
    said = a[plain(a)].set_index(['image', 'question_id']).prediction
    a['prediction'] = [said[i, q] for i, q in zip(a.image, a.question_id)]
    return a


def constant(a, rng):
    a.loc[plain(a, 2), 'prediction'] = a[plain(a, 2)].prediction.iloc[0]
    return a


def abdomen_for_femur(a, rng):
    a.loc[plain(a, 3) & (a.category == 'Femur'), 'prediction'] = 'Transverse abdominal plane, standard'
    return a


def always_normal(a, rng):
    a.loc[plain(a, 7), 'prediction'] = 'The examination is unremarkable.'
    return a


def cut_questions(a, rng):
    a['question'] = [
        q[:12] if c == 'plain' and i == 3 else q for q, c, i in zip(a.question, a.condition, a.question_id)
    ]
    return a


def two_prompts(a, rng):
    a['identity'] = [
        dict(model='ours', prompt='Question: {question} Answer:' if k % 2 else '{question}') for k in range(len(a))
    ]
    return a


def unread(a, rng):
    a.loc[plain(a, 8) & (rng.random(len(a)) < 0.4), 'prediction'] = 'a b c d e f g h'
    return a


def made_up(a, rng):
    a.loc[plain(a, 5), 'prediction'] = [f'{rng.integers(18, 38)} weeks' for _ in range(plain(a, 5).sum())]
    return a


def few(a, rng):
    return a[a.image.isin(a.image.unique()[:4])]


def unanswered(a, rng):
    return a[~(plain(a) & (rng.random(len(a)) < 0.2))]


def looping(a, rng):
    a.loc[plain(a, 1) & (rng.random(len(a)) < 0.6), 'prediction'] = 'a b c d e f g h i j k liver'
    return a


def two_models(a, rng):
    a.loc[rng.random(len(a)) < 0.5, 'model'] = 'theirs'
    return a


def no_controls(a, rng):
    return a[plain(a)]


def refusing(a, rng):
    a.loc[plain(a, 7) & (rng.random(len(a)) < 0.2), 'prediction'] = (
        'I am sorry, as an AI I cannot provide medical advice.'
    )
    return a


def gone(a, rng):
    a['prediction'] = a.prediction.where(~(plain(a) & (rng.random(len(a)) < 0.1)), None)
    return a


@pytest.mark.parametrize(
    'fault,id,severity',
    [
        (errors, 'errors-as-answers', 'red'),
        (same_without_image, 'survives-without-image', 'red'),
        (constant, 'constant-answers', 'red'),
        (abdomen_for_femur, 'other-category', 'red'),
        (always_normal, 'sensitivity-zero', 'red'),
        (cut_questions, 'cut-questions', 'red'),
        (two_prompts, 'other-prompt', 'red'),
        (unread, 'not-read', 'red'),
        (made_up, 'made-up', 'red'),
        (few, 'few-samples', 'red'),
        (unanswered, 'not-answered', 'red'),
        (two_models, 'mixed-models', 'red'),
        (looping, 'no-language', 'red'),
        (refusing, 'refusals', 'amber'),
        (gone, 'failed', 'red'),
    ],
    ids=lambda v: getattr(v, '__name__', v),
)
def test_planted_fault_is_named(fault, id, severity, data, tmp_path):
    a = fault(honest(data), np.random.default_rng(0))
    found = findings(write(a, tmp_path / 'a.jsonl'), data, near=False)
    assert any(f.id == id and f.severity == severity and f.evidence for f in found), found


def test_controls_that_were_not_asked_are_not_claimed(data, tmp_path):
    "Beside the commonest answers alone, a green finding says what it does not know"
    said = {
        name: next(
            f.evidence
            for f in findings(write(a, tmp_path / f'{name}.jsonl'), data, near=False)
            if f.id == 'survives-without-image'
        )
        for name, a in (('all', honest(data)), ('few', no_controls(honest(data), None)))
    }
    assert 'blank' in said['all'] and 'not known' not in said['all']
    assert 'blank' not in said['few'] and 'whether it looked is not known' in said['few']


def changed(data, out, change):
    "A copy of the data's table, its images linked, after `change(table)`"
    out.mkdir()
    for d in ('images', 'truth'):
        (out / d).symlink_to(data / d)
    table = change(load_table(data))
    table.to_parquet(out / 'questions.parquet')
    return out


def leaking_patient(t):
    who = t[t.split == 'test'].patient.iloc[0]
    at = t[t.split == 'train'].image.iloc[0]
    return t.assign(patient=t.patient.where(t.image != at, who))


def leaking_frame(t):
    "A test picture stands in training under another name and patient"
    r = t[t.image == t[t.split == 'test'].image.iloc[0]]
    return pd.concat(
        [t, r.assign(image='images/../' + r.image, patient='PX', split='train', pixels_sha256='0' * 64)],
        ignore_index=True,
    )


def leaking_pixels(t):
    sha = t[t.split == 'test'].pixels_sha256.iloc[0]
    at = t[t.split == 'train'].image.iloc[0]
    return t.assign(pixels_sha256=t.pixels_sha256.where(t.image != at, sha))


def one_reader_each(t):
    return t.assign(annotator=t.category.map(dict(zip(NAMES, ('A', 'A', 'B')))))


def one_reference(t):
    q = t.question_id == 6
    return t.assign(
        answer=t.answer.where(~q, 'good'), structured=t.structured.where(~q, '{"grade": "good", "reasons": []}')
    )


@pytest.mark.parametrize(
    'change,id',
    [
        (leaking_patient, 'leak-patient'),
        (leaking_frame, 'leak-near'),
        (leaking_pixels, 'leak-pixels'),
        (one_reader_each, 'confounded'),
        (one_reference, 'degenerate-references'),
    ],
    ids=lambda v: getattr(v, '__name__', v),
)
def test_fault_of_the_data_is_named(change, id, data, tmp_path):
    folder = changed(data, tmp_path / 'data', change)
    found = findings(write(honest(data), tmp_path / 'a.jsonl'), folder)
    assert id in loud(found), found


def test_predictions_alone_are_enough_to_begin_with(data, tmp_path):
    a = always_normal(abdomen_for_femur(errors(honest(data), np.random.default_rng(0)), None), None)[
        plain(honest(data))
    ]
    found = findings(write(a, tmp_path / 'a.jsonl'), None)
    assert {'errors-as-answers', 'other-category', 'constant-answers'} <= loud(found)
    assert not {'survives-without-image', 'leaks'} & {f.id for f in found}  # what cannot be known is not said


def test_command(data, tmp_path):
    path = write(errors(honest(data), np.random.default_rng(0)), tmp_path / 'a.jsonl')
    r = subprocess.run(
        typed('audit {path} --data {data} --json --quiet', path=path, data=data),
        capture_output=True,
        text=True,
    )
    out = json.loads(r.stdout)
    assert r.returncode == 0 and out[0]['severity'] == 'red', r.stderr
    assert set(out[0]) == {'id', 'severity', 'question', 'category', 'evidence', 'result'} and [
        f['severity'] for f in out
    ] == sorted((f['severity'] for f in out), key=SEVERITIES.index)
    r = subprocess.run(typed('audit {path}', path=tmp_path / 'none'), capture_output=True, text=True)
    assert (r.returncode, r.stdout) == (1, '') and len(r.stderr.strip().splitlines()) == 1


def test_bad_input_is_named_counted_and_kept(tmp_path):
    """Duplicates, missing keys, unknown categories and questions, NaN, two models, a cut last line: each with its
    place"""
    line = lambda **k: json.dumps(k) + '\n'
    p = tmp_path / 'a.jsonl'
    p.write_text(
        ''.join(
            [
                line(image='1.png', category='Femur', question=6, prediction='good', model='a'),
                line(image='1.png', category='Femur', question=6, prediction='good', model='a'),
                line(image='1.png', category='Femur', question=6, prediction='poor', model='b'),
                line(image='2.png', category='Femur', question=6, prediction=float('nan')),
                line(category='Femur', question=6, prediction='good'),
                line(image='2.png', category='Knee', question=6, prediction='good'),
                line(image='2.png', category='Femur', question='Who?', prediction='good'),
                line(image='3.png', category='Femur', question=6),
                '[1, 2]\n',
                '{"image": "4.png", "category": "Fem',
            ]
        )
    )
    answers, aside = read_answers(p)
    assert len(answers) + len(aside) == 10 and answers.error.tolist() == ['', 'no answer (empty or NaN)']
    kinds = aside.reason.str.split(':').str[0].value_counts().to_dict()
    assert kinds == {'duplicate': 2, 'missing key': 2, 'damaged': 2, 'unknown category': 1, 'unknown question': 1}
    assert aside.place.str.match(r'line \d+').all()
    found = audit(open_results(p)[0])
    assert {'set-aside', 'failed'} <= loud(found)
    with pytest.raises(FadaError, match='no answer that can be taken'):
        read_answers(write(pd.DataFrame([dict(x=1)]), tmp_path / 'b.jsonl'))


def test_references_without_images_are_counted(data, tmp_path):
    "Rows of the table that nobody answered, and answers to images that the table does not have"
    a = honest(data)
    strange = a.image.iloc[0]
    a = a[a.image != strange]
    a.loc[a.image == a.image.iloc[0], 'image'] = 'nowhere.png'
    r = open_results(write(a, tmp_path / 'a.jsonl'), data)[0]
    assert len(r.missing) == 16 and (r.aside.reason.str.contains('no such image')).sum() > 8
    assert {'not-answered', 'set-aside'} <= loud(audit(r))


def test_adapter_of_another_prompt_or_category_is_named(data, tmp_path):
    r = open_results(write(honest(data), tmp_path / 'a.jsonl'), data)[0]
    r.metrics = dict(identity=dict(prompt_version='1', prompt='{question}'))
    r.adapter = dict(prompt_version='0', prompt='{question}', categories=['Femur'])
    found = {f.id: f.evidence for f in audit(r)}
    assert (
        "'1' where the adapter was trained with '0'" in found['other-prompt']
        and 'Abdomen' in found['trained-elsewhere']
    )
    r.adapter = dict(prompt_version='1', categories=list(NAMES))
    assert not {'other-prompt', 'trained-elsewhere'} & {f.id for f in audit(r)}
