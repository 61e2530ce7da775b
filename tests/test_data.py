"""A group's real folder: bad input of every kind, and proof that each input row is in the table or in the
quarantine."""

import csv, io, json, os, random, struct, zipfile, zlib
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw
from openpyxl import Workbook
from fada.annotate import LOG, annotate, annotations
from fada.checks import check
from fada.clinical import QUESTIONS
from fada.data import load_table, prepare, split_table, verify
from fada.images import hashed, public_name, read_image
from fada.readers import read_any, read_group_folder
from fada.settings import FadaError

HEADERS = ['Folder Name', 'Image Name', 'Status', *(f'Q{q}: {o.key}' for q, o in QUESTIONS.items())]
TITLES = ('Anatomical Structures', 'Fetal Orientation')


def picture(path, seed=0, size=(40, 48)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 120, size, np.uint8)).save(path)
    return path


def group_folder(d, n=8, categories=('Femur', 'Abodomen')):
    "A valid folder: category folders, one workbook for all, eight answers an image"
    rows = []
    for c, cat in enumerate(categories):
        for k in range(n):
            picture(d / cat / f'img_{k}.png', 100 * c + k)
            rows.append([cat, f'img_{k}.png', 'Done', *(f'answer {q} of {cat} {k}' for q in QUESTIONS)])
    return rows


def write_rows(d, rows, name='answers.csv', headers=HEADERS):
    with open(d / name, 'w', newline='', encoding='utf-8') as f:
        csv.writer(f).writerows([headers, *rows])


def reasons(r):
    return ' | '.join(r.quarantine.reason)


def png_bomb(path, side=50_000):
    "A PNG of a few KB that declares and holds 2.5 thousand million pixels"
    chunk = lambda k, b: struct.pack('>I', len(b)) + k + b + struct.pack('>I', zlib.crc32(k + b))
    z = zlib.compressobj(9)
    data = b''.join(z.compress(bytes(side + 1)) for _ in range(200)) + z.flush()
    path.write_bytes(
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', struct.pack('>IIBBBBB', side, side, 8, 0, 0, 0, 0))
        + chunk(b'IDAT', data)
        + chunk(b'IEND', b'')
    )


# ---- bad images


@pytest.mark.parametrize(
    'name,make,said',
    [
        ('zero.png', lambda p: p.write_bytes(b''), '0 bytes'),
        ('cut.png', lambda p: p.write_bytes(picture(p).read_bytes()[:900]), 'not a readable image'),
        ('text.jpg', lambda p: p.write_text('hello'), 'not a readable image'),
        ('bomb.png', png_bomb, '2500000000 pixels'),
        ('cut.dcm', lambda p: p.write_bytes(b'\0' * 128 + b'DICM' + b'\x08\0'), 'DICOM'),
    ],
)
def test_a_bad_image_is_named_and_the_rest_goes_through(tmp_path, name, make, said):
    rows = group_folder(tmp_path, 2, ('Femur',))
    make(tmp_path / 'Femur' / name)
    write_rows(tmp_path, [*rows, ['Femur', name, 'Done', *'abcdefgh']])
    r = read_group_folder(tmp_path)
    assert len(r.rows) == 16 and said in reasons(r)
    assert set(r.quarantine.file) == {f'Femur/{name}', 'answers.csv'} and (r.quarantine.row == 4).sum() == 8


def test_a_tiff_of_2_gb_is_refused_by_its_header(tmp_path):
    p = tmp_path / 'Femur' / 'huge.tif'
    p.parent.mkdir()
    tags = [
        (256, 4, 1, 40_000),
        (257, 4, 1, 18_000),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, 1, 200),
        (277, 3, 1, 1),
        (278, 4, 1, 18_000),
        (279, 4, 1, 2_160_000_000),
    ]
    head = b'II*\0' + struct.pack('<I', 8) + struct.pack('<H', len(tags))
    p.write_bytes(head + b''.join(struct.pack('<HHII', *t) for t in tags) + struct.pack('<I', 0))
    with open(p, 'r+b') as f:
        f.truncate(2_160_000_200)  # sparse: takes no room on the disk
    with pytest.raises(FadaError, match='2.2 GB in one picture'):
        read_image(p)
    write_rows(tmp_path, [*group_folder(tmp_path, 2, ('Femur',)), ['Femur', 'huge.tif', 'Done', *'abcdefgh']])
    r = read_group_folder(tmp_path)
    assert len(r.rows) == 16 and '2.2 GB in one picture' in reasons(r)
    with open(p, 'r+b') as f:
        f.truncate(4000)
    with pytest.raises(FadaError, match='720000000 pixels'):
        read_image(p)


def test_links_out_of_the_folder_are_not_followed(tmp_path):
    d = tmp_path / 'd'
    rows = group_folder(d, 2, ('Femur',))
    picture(tmp_path / 'outside' / 'x.png')
    (d / 'Femur' / 'x.png').symlink_to(tmp_path / 'outside' / 'x.png')
    (d / 'Thorax').symlink_to(tmp_path / 'outside')
    write_rows(d, [*rows, ['Femur', 'x.png', '', *'abcdefgh']])
    r = read_group_folder(d)
    assert (
        len(r.rows) == 16 and 'a symbolic link out of the folder' in reasons(r) and 'a link to a folder' in reasons(r)
    )
    assert ((r.quarantine.file == 'answers.csv') & (r.quarantine.row == 4)).sum() == 1


@pytest.mark.parametrize(
    'name', ['Ünï cödé 胎児.png', 'with  two spaces.png', 'CON.png', 'a:b?.png', 'trailing .png', "quote'.png"]
)
def test_odd_names_are_taken(tmp_path, name):
    picture(tmp_path / 'Femur' / name)
    write_rows(tmp_path, [['Femur', name, '', *'abcdefgh']])
    r = read_group_folder(tmp_path)
    assert len(r.rows) == 8, reasons(r)
    assert any('Windows' in n['finding'] for n in r.notes) == (name in ('CON.png', 'a:b?.png'))


def test_two_images_of_one_name(tmp_path):
    picture(tmp_path / 'Femur' / 'a.png')
    picture(tmp_path / 'Femur' / 'a.jpg', 1)
    picture(tmp_path / 'Femur' / 'b.png', 2)
    write_rows(tmp_path, [['Femur', 'a', '', *'abcdefgh'], ['Femur', 'a.jpg', '', *'abcdefgh']])
    r = read_group_folder(tmp_path)
    assert {x['image'] for x in r.rows} == {'Femur/a.jpg'}  # the full name is clear, the stem alone is not
    assert '2 images of one name' in reasons(r) and (r.quarantine.reason == 'image without answers').sum() == 2


def test_a_folder_with_none_of_it(tmp_path):
    with pytest.raises(FadaError, match='no image has an answer'):
        prepare(tmp_path, 0, [], source='folder')
    (tmp_path / 'notes.txt').write_text('buy milk\n')
    picture(tmp_path / 'holiday' / 'beach.png')
    r = read_any(tmp_path)
    assert not r.rows and 'no known category' in reasons(r) and 'no image or question column' in reasons(r)


def test_a_name_or_an_exif_says_who_and_where(tmp_path):
    names = [
        'Patient00168_Plane5_2_of_2.png',
        'patient003_DZA_plane1.png',
        'Patient7_a.png',
        'img_1.jpg',
        'img_2.png',
    ]
    exif = Image.Exif()
    exif[0x010F], exif[0x0110], exif[0x013B] = 'GE', 'GE Voluson E10', 'Miller'
    for k, n in enumerate(names):
        picture(tmp_path / 'Femur' / n, k)
    Image.open(tmp_path / 'Femur' / 'img_1.jpg').save(tmp_path / 'Femur' / 'img_1.jpg', exif=exif)
    write_rows(tmp_path, [['Femur', n, '', *'abcdefgh'] for n in names])
    r = read_group_folder(tmp_path)
    t = r.table[r.table.question_id == 1].set_index(r.table[r.table.question_id == 1].image.str[6:])
    assert t.patient[names[:3]].tolist() == ['fetal-planes:168', 'african-planes:Algeria:3', hashed('named:7')]
    assert t.dataset[names[:3]].tolist() == ['fetal-planes', 'african-planes', tmp_path.name]
    assert t.site[names[1]] == 'Algeria' and t.patient[names[4]].startswith('image:')
    assert 'file names' in r.mapping
    assert t.machine['img_1.jpg'] == 'GE Voluson E10' and t.machine.notna().sum() == 1
    assert not r.table.to_csv().count('Miller')


def test_a_log_of_annotations_takes_any_text_and_names_torn_lines(tmp_path):
    "Line breaks of Unicode and half a surrogate pair are text; a line that is not whole is named by its number"
    rows = group_folder(tmp_path, 4)
    write_rows(tmp_path, rows)
    prepare(tmp_path, 0, [])
    t = load_table(tmp_path)
    r = t[t.question_id == 6].iloc[0]
    said = ['a\u2028b', 'c\x85d', 'e\ud83d']
    for s in said:
        annotate(tmp_path, 'Ada', r.image, r.pixels_sha256, 6, s)
    a = annotations(tmp_path)
    assert a.after.tolist() == [*said[:2], 'e\ufffd'] and a.attrs['torn'] == []
    with open(tmp_path / LOG, 'ab') as f:
        f.write('{"after": "é'.encode()[:-1])
    annotate(tmp_path, 'Ada', r.image, r.pixels_sha256, 6, 'moderate', r.answer)
    a = annotations(tmp_path)
    assert a.attrs['torn'] == [4] and list(a.index) == [1, 2, 3, 5]
    c = check(tmp_path).findings
    c = c[c.finding.str.contains('not whole')]
    assert len(c) == 1, c
    assert c.action.iloc[0] == 'quarantined' and '4' in str(c.iloc[0].to_dict())


def test_corrections_are_applied_and_traceable(tmp_path):
    rows = group_folder(tmp_path, 4)
    write_rows(tmp_path, rows)
    prepare(tmp_path, 0, [])
    t = load_table(tmp_path)
    r = t[t.question_id == 6].iloc[0]
    fix = lambda before, after: annotate(tmp_path, 'Ada', r.image, r.pixels_sha256, 6, after, before)
    fix(r.answer, 'moderate')
    fix('moderate', 'Good image quality')
    fix('never said', 'poor')
    assert verify(tmp_path).finding.str.startswith('new').all() and len(verify(tmp_path)) == 1
    c = check(tmp_path).findings
    c = c[c.kind == 'correction']
    assert sorted(c.action) == ['quarantined', 'repaired']
    assert "'Good image quality', corrected by Ada" in ' '.join(c.finding)
    for _ in range(2):  # again: the same
        m = prepare(tmp_path, 0, [])
        n = load_table(tmp_path)
        n = n[n.corrected_by.notna()]
        assert len(n) == 1
        assert (n.answer.iloc[0], n.corrected_from.iloc[0]) == ('Good image quality', r.answer)
        assert n.answer_norm.iloc[0] == 'good' and json.loads(n.structured.iloc[0])['grade'] == 'good'
        assert (m['corrected'], m['quarantined'], len(verify(tmp_path))) == (1, 1, 0)
    for x in rows:
        x[8] = 'fair' if x[1] == Path(r.image).name else x[8]  # the workbook was changed
    write_rows(tmp_path, rows)
    m = prepare(tmp_path, 0, [])
    assert (m['corrected'], m['quarantined']) == (0, 3)
    assert 'fair' in set(load_table(tmp_path).answer)


def test_the_report_blanks_what_is_outside_the_sector(tmp_path):
    from fada.report import shown

    y, x = np.mgrid[:240, :320]
    fan = (np.hypot(y + 20, x - 160) < 230) & (abs(x - 160) < 0.7 * (y + 20)) & (y > 30)
    a = (fan * np.random.default_rng(0).gamma(2, 40, fan.shape)).clip(0, 255).astype(np.uint8)
    im = Image.fromarray(a)
    ImageDraw.Draw(im).text((4, 4), 'MILLER ANNA', 255, font_size=14)
    im.save(tmp_path / 'a.png')
    picture(tmp_path / 'flat.png', size=(20, 20))
    Image.new('L', (320, 240), 4).save(tmp_path / 'dark.png')
    own, phantoms = pd.DataFrame(dict(dataset=['ours'])), pd.DataFrame(dict(dataset=['fada-phantoms']))
    see = lambda n, t: np.asarray(shown(tmp_path, n, t).convert('L'))
    assert see('a.png', phantoms)[:25, :110].max() == 255 and not see('a.png', own)[:25, :110].any()
    assert (see('a.png', own)[80:180, 130:190] == a[80:180, 130:190]).all()
    assert see('dark.png', own).min() > 100  # no sector: not shown, and it says so


# ---- bad workbooks


def test_excel_of_every_kind(tmp_path):
    rows = group_folder(tmp_path, 4, ('Femur',))
    b = Workbook()
    ws = b.active
    ws.append(['Readings of June'])
    ws.append([])
    ws.append(['Folder\nName', ' image_name ', 'STATUS', *(f'Q{q}:\nWhat about it?' for q in QUESTIONS)])
    for x in rows:
        ws.append(x)
    ws['D4'] = '=CONCAT("a","b")'
    ws['E4'] = '#REF!'
    ws['F4'] = pd.Timestamp('2024-05-20').to_pydatetime()
    ws.merge_cells('A4:A7')
    ws['I5'] = 20.0
    hid = b.create_sheet('draft')
    hid.append(HEADERS)
    hid.append(rows[0])
    hid.sheet_state = 'hidden'
    b.create_sheet('empty')
    b.save(tmp_path / 'w.xlsx')
    with zipfile.ZipFile(tmp_path / 'w.xlsx', 'a') as z:
        z.writestr('xl/vbaProject.bin', b'macro')
    (tmp_path / 'w.xlsx').rename(tmp_path / 'w.xlsm')
    r = read_group_folder(tmp_path)
    assert len(r.rows) == 4 * 8 - 3 and {x['category'] for x in r.rows} == {'Femur'}
    assert next(x['answer'] for x in r.rows if x['source'].endswith(':5') and x['question_id'] == 6) == '20'
    for s in (
        'a formula without a stored value',
        'an Excel error (#REF!)',
        'Excel stored a date',
        'a hidden sheet',
        'an empty sheet',
    ):
        assert s in reasons(r), s
    said = ' | '.join(n['finding'] for n in r.notes)
    assert 'macros, which were not run' in said and 'merged cells A4:A7' in said


@pytest.mark.parametrize(
    'name,raw,said',
    [
        ('old.xls', b'\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1', 'the old Excel format'),
        ('empty.xlsx', b'', '0 bytes'),
        ('junk.xlsx', b'PK\x03\x04junk', 'not a readable workbook'),
        ('junk.csv', bytes(range(256)) * 4, 'not a text file'),
        ('blank.csv', b'\n\n', 'an empty file'),
        ('other.csv', b'a,b\n1,2\n', 'no image or question column'),
        ('twice.csv', b'Image Name,Q1,Question 1\nimg_0,a,b\n', 'two columns mean 1'),
    ],
)
def test_a_bad_workbook_is_named_and_the_rest_goes_through(tmp_path, name, raw, said):
    write_rows(tmp_path, group_folder(tmp_path, 2))
    (tmp_path / name).write_bytes(raw)
    r = read_group_folder(tmp_path)
    assert len(r.rows) == 32 and said in reasons(r) and set(r.quarantine.file) == {name}


def test_a_workbook_with_a_password(tmp_path):
    "Encrypted as Excel does it: named, and the rest goes through"
    from msoffcrypto.format.ooxml import OOXMLFile

    write_rows(tmp_path, group_folder(tmp_path, 2))
    b = Workbook()
    b.active.append(HEADERS)
    plain = io.BytesIO()
    b.save(plain)
    with open(tmp_path / 'locked.xlsx', 'wb') as f:
        OOXMLFile(plain).encrypt('secret', f)
    r = read_group_folder(tmp_path)
    assert (
        len(r.rows) == 32 and 'a workbook with a password' in reasons(r) and set(r.quarantine.file) == {'locked.xlsx'}
    )


def test_a_workbook_that_unpacks_to_too_much(tmp_path, monkeypatch):
    write_rows(tmp_path, group_folder(tmp_path, 2))
    b = Workbook()
    b.active.append(HEADERS)
    b.active.append(['x' * 30_000] * 9)
    b.save(tmp_path / 'bomb.xlsx')
    assert (tmp_path / 'bomb.xlsx').stat().st_size < 10_000
    monkeypatch.setattr('fada.sheets.MAX_UNPACKED', 30_000)
    r = read_group_folder(tmp_path)
    assert len(r.rows) == 32 and 'unpacks to more than' in reasons(r)


@pytest.mark.parametrize(
    'enc', ['utf-8', 'utf-8-sig', 'latin-1', 'cp1252', 'utf-16', 'utf-16-le', 'utf-16-be', 'utf-32']
)
@pytest.mark.parametrize('sep', [',', ';', '\t', '|'])
def test_delimited_in_any_encoding_and_separator(tmp_path, enc, sep):
    picture(tmp_path / 'Femur' / 'a.png')
    f = io.StringIO()
    csv.writer(f, delimiter=sep).writerows(
        [['Image Name', 'Q1', 'Q6'], ['a.png', 'fémur; "shaft", a|b\nsecond line', 'größe gut']]
    )
    (tmp_path / 'Femur' / 'x.csv').write_bytes(f.getvalue().encode(enc))
    r = read_group_folder(tmp_path)
    assert [x['answer'].splitlines()[0] for x in r.rows] == ['fémur; "shaft", a|b', 'größe gut'] and not r.aside


def test_mixed_separators(tmp_path):
    rows = group_folder(tmp_path, 3, ('Femur',))
    lines = [','.join(HEADERS), ','.join(rows[0]), ';'.join(rows[1]), ','.join([*rows[2], 'x', 'y'])]
    (tmp_path / 'a.csv').write_text('\n'.join(lines))
    r = read_group_folder(tmp_path)
    assert (
        len(r.rows) == 16
        and '13 cells under 11 headers' in reasons(r)
        and any("separated by ';'" in n['finding'] for n in r.notes)
    )


# ---- accounting


def account(d, rows, r):
    """Every answer cell and every image is in the table, a second reading, or set aside: by cell, by row, or by its
    file"""
    inside = {(x['source'], x['question_id']) for x in [*r.rows, *r.seconds]}
    aside = {(a['file'], a['row'], a['field']) for a in r.aside}
    for i in rows:
        for q in QUESTIONS:
            ok = (f'answers.csv:{i}', q) in inside
            no = any(
                (f, n) in {('answers.csv', i), ('answers.csv', 0)} and (k == f'Q{q}' or not k.startswith('Q'))
                for f, n, k in aside
            )
            assert ok != no, (i, q, ok, no, [a for a in r.aside if a['row'] == i])
    seen = {x['image'] for x in [*r.rows, *r.seconds]}
    for p in d.rglob('*.png'):
        n = p.relative_to(d).as_posix()
        assert (n in seen) != any(a[0] == n for a in aside), n


def mutate(d, rows, rng):
    "One thing that goes wrong in real folders"
    images = sorted(p for p in d.rglob('*.png') if not p.is_symlink())
    p = rng.choice(images)
    row = rng.choice(rows)
    k = rng.randrange(len(row))
    kind = rng.randrange(16)
    if kind == 0:
        p.unlink()
    elif kind == 1:
        p.write_bytes(b'')
    elif kind == 2:
        p.write_bytes(p.read_bytes()[: rng.randrange(1, 200)])
    elif kind == 3:
        p.rename(p.with_name(p.name.upper().replace('.PNG', '.png')))
    elif kind == 4:
        picture(p.with_name(f'extra {rng.random()}.png'), rng.randrange(10**6))
    elif kind == 5:
        rows.append(list(row))
    elif kind == 6:
        row[k] = ''
    elif kind == 7:
        row[k] = rng.choice(['N/A', '-', '?', 'TBD', 'nan'])
    elif kind == 8:
        row[1] = rng.choice(['ghost.png', row[1].upper(), Path(row[1]).stem, ' ' + row[1] + ' ', '../' + row[1]])
    elif kind == 9:
        row[0] = rng.choice(['Femur', 'femur ', 'Abdomen', 'ABODOMEN', 'Nowhere', ''])
    elif kind == 10:
        row[k] = rng.choice(['a;b', 'x,y', '"quoted"', 'line\nbreak', '日本', '=1+1', '\u202e', "O'Neil | co"])
    elif kind == 11:
        rows.remove(row)
    elif kind == 12:
        row[2] = rng.choice(['Pending', 'rejected', 'done', 'in progress'])
    elif kind == 13:
        (p.parent / f'copy_{rng.randrange(99)}.png').write_bytes(p.read_bytes())
    elif kind == 14 and len(row) > 4:
        del row[-1]
    elif kind == 15:
        row.append('overflow')


@pytest.mark.parametrize('seed', range(25))
def test_fuzz_nothing_is_lost_or_made_up(tmp_path, seed):
    rng = random.Random(seed)
    rows = group_folder(tmp_path, 5)
    for _ in range(rng.randrange(1, 14)):
        if len(rows) > 2 and len(list(tmp_path.rglob('*.png'))) > 2:
            mutate(tmp_path, rows, rng)
    write_rows(tmp_path, rows)
    r = read_group_folder(tmp_path)
    given = [' '.join(str(c).split()) for x in rows for c in x]
    lines, line = [], 2  # the line on which each record starts: a quoted cell may span several
    for x in rows:
        lines.append(line)
        line += 1 + sum(c.count('\n') for c in x)
    account(tmp_path, [l for l, x in zip(lines, rows) if any(c.strip() for c in x)], r)
    assert all(' '.join(x['answer'].split()) in given for x in r.rows)  # no answer that nobody gave
    assert all((tmp_path / x['image']).is_file() for x in r.rows) and all(a['reason'] for a in r.aside)


def spoil(d, records, rng):
    "One thing that goes wrong in chat files"
    rec = rng.choice(records)
    turns = rec['conversations']
    kind = rng.randrange(13)
    p = d / 'Femur' / f'{rng.randrange(6)}.png'
    if kind == 0:
        rec['image'] = rng.choice(['ghost.png', '../out.png', 'https://example.org/x.png', 'data:image/png;AA'])
    elif kind == 1:
        rec['image'] = [rec.get('image'), 'Femur/1.png']
    elif kind == 2:
        turns.append({'from': 'human', 'value': 'And the image quality?'})  # never answered
    elif kind == 3 and turns:
        turns[rng.randrange(len(turns))]['value'] = rng.choice(['', 'N/A', 'What is the weather like?'])
    elif kind == 4:
        records.append(json.loads(json.dumps(rec)))
    elif kind == 5:
        rec['category'] = 'Nowhere'
    elif kind == 6:
        del turns[:1]
    elif kind == 7:
        p.exists() and p.write_bytes(p.read_bytes()[:40])
    elif kind == 8:
        p.unlink(missing_ok=True)
    elif kind == 9:
        rec.pop('image', None)
    elif kind == 10:
        turns.clear()
    else:
        rec[rng.choice(['image', 'category', 'question_id', 'patient', 'id'])] = rng.choice(
            [5, -0.5, True, [[1]], {'a': [1]}, ['x', None], {'path': 3}]
        )


@pytest.mark.parametrize('role', [['user'], {'name': 'user'}, 7, None])
def test_a_role_that_is_no_text_sets_its_record_aside(tmp_path, role):
    "The other records of the file are read"
    Image.new('L', (64, 48), 90).save(tmp_path / 'femur.png')

    def record(role):
        turns = [dict(role=role, content='Assess the image quality.'), dict(role='assistant', content='good')]
        return dict(image='femur.png', category='Femur', messages=turns)

    (tmp_path / 'data.jsonl').write_text('\n'.join(json.dumps(record(r)) for r in (role, 'user')))
    r = read_any(tmp_path, 'chat')
    assert [(a['row'], a['field']) for a in r.aside] == [(1, 'turn 1')]
    assert [x['answer'] for x in r.rows] == ['good']


@pytest.mark.parametrize('seed', range(40))
def test_fuzz_of_chat_files(tmp_path, seed):
    "Each question of each record is in the table or set aside, or its whole record or line is"
    rng = random.Random(seed)

    def pairs(rec):  # each question, and each answer that no question stands before
        who = [t['from'] for t in rec['conversations']]
        return sum(w == 'human' or before != 'human' for before, w in zip([None, *who], who))

    for k in range(6):
        picture(tmp_path / 'Femur' / f'{k}.png', k)
    turn = lambda q, k: [
        {'from': 'human', 'value': QUESTIONS[q].text},
        {'from': 'gpt', 'value': f'answer {q} of {k}'},
    ]
    records = [dict(image=f'Femur/{k}.png', conversations=turn(1, k) + turn(6, k)) for k in range(6)]
    for _ in range(rng.randrange(1, 10)):
        spoil(tmp_path, records, rng)
    lines = [json.dumps(r) for r in records]
    torn = rng.randrange(len(lines)) if seed % 3 == 0 else None
    if torn is not None:
        lines[torn] = lines[torn][:-9]
    (tmp_path / 'data.jsonl').write_text('\n'.join(lines))
    r = read_any(tmp_path, 'chat')
    for i, rec in enumerate(records, 1):
        taken = sum(x['source'] == f'data.jsonl:{i}' for x in r.rows)
        aside = [
            a for a in r.aside if (a['file'], a['row']) == ('data.jsonl', i) and a['field'][:1] in ('', 't', 'Q')
        ]
        whole = [a for a in aside if not a['field']]
        assert (len(whole) == 1 and not taken) if whole else taken + len(aside) == pairs(rec), (i, rec, aside)
        assert (i - 1 == torn) <= bool(whole)
    assert all(a['reason'] for a in r.aside) and all(x['answer'].startswith(('answer', 'What')) for x in r.rows)
    seen = {x['image'] for x in r.rows}
    for p in tmp_path.rglob('*.png'):
        n = p.relative_to(tmp_path).as_posix()
        assert (n in seen) != any(a['file'] == n for a in r.aside), n


def test_slips_and_what_no_picture_shows(tmp_path):
    "A misspelling of a common answer is named with its row; so are ages and sizes that an image cannot give"
    rows = group_folder(tmp_path, 8)
    for k, r in enumerate(rows):
        r[4 + 2], r[4 + 3], r[4 + 4] = 'length 31 mm', '22 weeks', 'Good quality' if k else 'Good qualty'
    rows[3][4 + 4] = 'hardly good'  # another wording is no slip
    write_rows(tmp_path, rows)
    f = check(tmp_path).findings
    slip = f[f.kind == 'spelling']
    assert slip.field.tolist() == ['Q6'] and slip.row.tolist() == [2]
    assert "'good qualty' is nearly 'good quality' (14×)" in slip.finding.iloc[0]
    blind = f[f.kind == 'not in the picture']
    assert blind.field.tolist() == ['Q4', 'Q5']
    assert blind.finding.str.startswith('16 answers').all()


def test_a_picture_that_was_changed_is_not_exported(tmp_path):
    from fada.export import export

    d = tmp_path / 'd'
    write_rows(d, group_folder(d, 6))
    prepare(d, 0, [], source='folder')
    picture(d / 'Femur' / 'img_0.png', 999)
    r = export(d, tmp_path / 'out', 'csv', keep_text=True)
    assert r['images'] == 11 and [x['file'] for x in r['left_behind']] == ['Femur/img_0.png']
    assert 'changed since the table was made' in r['left_behind'][0]['reason']


def test_verify_before_prepare_and_an_unknown_split(tmp_path, small_data):
    with pytest.raises(FadaError, match='no question table yet.*fada prepare --data'):
        verify(tmp_path)
    with pytest.raises(FadaError, match='unknown split .tset.; did you mean test'):
        load_table(small_data, split='tset')


def test_a_folder_that_cannot_be_written_is_said_before_it_is_read(tmp_path, monkeypatch):
    write_rows(tmp_path, group_folder(tmp_path, 2))
    may = os.access  # root may write everywhere
    monkeypatch.setattr(os, 'access', lambda p, mode: mode != os.W_OK and may(p, mode))
    with pytest.raises(FadaError, match='the image folder cannot be written.*copy the folder'):
        prepare(tmp_path, 0, [], source='folder')


# ---- what a strict reading found


@pytest.mark.parametrize(
    'lines,taken',
    [
        (['a.png,Femur,"good', 'b.png,Femur,fair', 'c.png,Femur,poor'], 'bc'),  # open to the end of the file
        (['a.png,Femur,"good', 'b.png,Femur,"fair"', 'c.png,Femur,poor'], 'bc'),  # closed by the next answer's quote
        (['a.png,Femur,"good', 'b.png,Femur,fair"', 'c.png,Femur,poor'], 'bc'),  # closed where a row ends
        (['a.png,Femur,"good', 'or fair"', 'c.png,Femur,poor'], 'ac'),
    ],
)  # a cell of two lines is none
def test_a_quote_that_is_not_closed_swallows_no_row(tmp_path, lines, taken):
    for k, n in enumerate('abc'):
        picture(tmp_path / 'Femur' / f'{n}.png', k)
    (tmp_path / 'w.csv').write_text('\n'.join(['Image Name,Folder Name,Q6', *lines, '']))
    r = read_group_folder(tmp_path)
    assert ''.join(sorted(x['image'][6] for x in r.rows)) == taken
    lost = r.quarantine[r.quarantine.reason.str.contains('opened and not closed')]
    assert lost.row.tolist() == ([2] if taken == 'bc' else []) and not any('b.png' in x['answer'] for x in r.rows)


@pytest.mark.parametrize('source', [None, 'ultrasound'])
def test_how_a_pregnancy_was_dated_is_not_made_up(tmp_path, source):
    from fada.export import export

    d = tmp_path / 'd'
    rows = [[*r, 150, *([source] if source else [])] for r in group_folder(d, 6)]
    write_rows(d, rows, headers=[*HEADERS, 'GA days', *(['GA source'] if source else [])])
    prepare(d, 0, [], source='folder')
    c = check(d).findings
    assert c.finding.str.contains('no column "GA source"').sum() == (source is None)
    for f in ('csv', 'workbook', 'chat', 'datasets'):
        export(d, tmp_path / f, f, keep_text=True)
        prepare(tmp_path / f, 0, [], source='folder')
        t = load_table(tmp_path / f)
        assert set(t.ga_days) == {150} and (set(t.ga_source) if 'ga_source' in t else {None}) == {source}, f


@pytest.mark.parametrize('name', ['a.tif', 'a.webp', 'a.png'])
def test_more_pages_than_one_are_said(tmp_path, name):
    p = tmp_path / 'Femur' / name
    p.parent.mkdir()
    rng = np.random.default_rng(0)
    first, *rest = [Image.fromarray(rng.integers(0, 120, (40, 48, 3), np.uint8)) for _ in range(3)]
    first.save(p, save_all=True, append_images=rest)
    write_rows(tmp_path, [['Femur', name, '', *'abcdefgh']])
    for _ in range(2):  # remembered, too
        r = read_group_folder(tmp_path)
        assert len(r.rows) == 8
        assert [n['finding'] for n in r.notes if n['file'] == f'Femur/{name}'] == ['the first of 3 pages is read']


def test_an_unknown_published_split_is_said(tmp_path):
    write_rows(
        tmp_path, [[*r, 'holdout'] for r in group_folder(tmp_path, 2, ('Femur',))], headers=[*HEADERS, 'Split']
    )
    r = read_group_folder(tmp_path)
    said = [n for n in r.notes if n['field'] == 'published_split']
    assert (
        'published_split' not in r.table and [n['row'] for n in said] == [2, 3] and "'holdout'" in said[0]['finding']
    )


@pytest.mark.parametrize('text', ['m-198001011234', 'p-19800101123456789012', 'image:198001011234'])
def test_what_only_looks_like_a_hash_is_hashed(text, monkeypatch):
    h = hashed(text)
    assert text not in h and hashed(h) == h and hashed(h[:-1] + 'x') != h[:-1] + 'x'
    # made elsewhere: no proof here
    monkeypatch.setenv('FADA_SALT', 'another')
    assert hashed(h) != h


@pytest.mark.parametrize(
    'name,gone',
    [
        ('Abdomen/Jane Doe/img_1.png', 'jane'),
        ('Abdomen/1980010112345678.png', '19800101'),
        ('Femur/DOB_1980_01_02.png', '1980 _01_02'),
        ('Femur/img_12.3.1980.png', '12.3 1980'),
        ('img_19800102.png', '1980'),
        ('Femur/x.Miller', 'miller'),
        ('Femur/Patient123.png', '123'),
        ('n-19800101123456789012.png', '19800101123456789012'),
    ],
)
def test_a_public_name_names_nobody(name, gone):
    out = public_name(name)
    assert not any(g in out.lower() for g in gone.split()), out
    assert public_name(out) == out and out.split('/')[0] == name.split('/')[0] or '/' not in name


def test_a_public_name_keeps_what_tells_pictures_apart():
    for n in ('Femur/img_0012.png', 'plane_3_of_12.png', 'frame_123.dcm#4', 'Abodomen/slice 99.tif', 'scan_f101.png'):
        assert public_name(n) == n
    assert len(public_name(' '.join(f'Miller{chr(97 + k)}' for k in range(20)) + '.png')) < 140


def test_json_files_linked_from_elsewhere_are_not_read(tmp_path):
    d = tmp_path / 'd'
    picture(d / 'Femur' / 'a.png')
    (tmp_path / 'secret.json').write_text(
        json.dumps([dict(image='Femur/a.png', question='image quality', answer='secret')])
    )
    (d / 'x.json').symlink_to(tmp_path / 'secret.json')
    r = read_any(d, 'chat')
    assert not r.rows and [(a['file'], a['reason']) for a in r.aside if a['file'] == 'x.json'] == [
        ('x.json', 'a symbolic link out of the folder')
    ]


@pytest.mark.parametrize(
    'text,said',
    [
        ('{"splits": ["../out"]}', 'no folder beside it'),
        ('{"splits"', 'not valid JSON'),
        ('[]', 'no list of splits'),
        ('{"splits": [3, "/etc", "."]}', 'no folder beside it'),
    ],
)
def test_a_saved_dataset_stays_in_its_folder(tmp_path, text, said):
    import pyarrow as pa

    d = tmp_path / 'd'
    picture(d / 'Femur' / 'a.png')
    (tmp_path / 'out').mkdir()
    (d / 'dataset_dict.json').write_text(text)
    t = pa.table(dict(image=['Femur/a.png'], category=['Femur'], question=['image quality'], answer=['secret']))
    with pa.OSFile(str(tmp_path / 'out' / 'x.arrow'), 'wb') as f, pa.ipc.new_stream(f, t.schema) as w:
        w.write_table(t)
    r = read_any(d)
    assert r.reader == 'datasets' and not r.rows and said in reasons(r)


@pytest.mark.parametrize('facts', ['{"ga_days":', '[1]'])
def test_facts_that_are_no_json_cost_their_row_only(tmp_path, facts):
    for k, n in enumerate('ab'):
        picture(tmp_path / 'Femur' / f'{n}.png', k)
    pd.DataFrame(
        dict(
            image=['Femur/a.png', 'Femur/b.png'],
            category='Femur',
            question='image quality',
            answer='good',
            facts=[facts, '{"site": "x"}'],
        )
    ).to_parquet(tmp_path / 'train-00000-of-00001.parquet')
    r = read_any(tmp_path, 'datasets')
    assert [(x['image'], x['site']) for x in r.rows] == [('Femur/b.png', 'x')]
    assert [a['row'] for a in r.aside] == [1] and 'column facts' in reasons(r)


def test_agreement_with_first_readings_that_nobody_signed(tmp_path):
    rows = [[*r, ''] for r in group_folder(tmp_path, 2)]
    rows += [[*r[:-1], 'Ben'] for r in rows]
    write_rows(tmp_path, rows, headers=[*HEADERS, 'Annotator'])
    a = check(tmp_path).agreement
    assert set(a.annotators) == {'first / Ben'} and (a.agreement == 1).all() and len(a) == 8


def test_control_characters_do_not_stop_an_export(tmp_path):
    from fada.export import export

    d = tmp_path / 'd'
    write_rows(d, [[*r[:-1], 'see\x0bagain\x01'] for r in group_folder(d, 6)])
    prepare(d, 0, [], source='folder')
    for f in ('workbook', 'csv'):
        m = export(d, tmp_path / f, f, keep_text=True)
        assert 'control characters left out of 12 cells' in m['text']
        assert 'see again' in {x['answer'] for x in read_any(tmp_path / f).rows}


def test_shares_and_published_splits_that_leave_one_empty(tmp_path):
    t = pd.DataFrame(
        [
            dict(image=f'{c}{k}', pixels_sha256=f'{c}{k}', category=c, patient=f'{c}{k}', published_split=s)
            for c in ('Femur', 'Thorax')
            for k, s in enumerate(['train'] * 3 + ['test'] if c == 'Femur' else [None] * 2)
        ]
    )
    with pytest.raises(FadaError, match='Thorax: 2 patients'):
        split_table(t)
    only = split_table(t, shares=(0, 0, 1))
    assert (only[only.published_split == 'train'].split == 'train').all()
    assert (only[only.category == 'Thorax'].split == 'test').all()


def test_a_cine_that_was_changed_is_not_exported(tmp_path):
    from fada.export import export
    from test_dicom import RAMP, write

    frames = lambda k: np.stack([np.roll(RAMP, 6 * k, 1), np.roll(RAMP, 6 * k + 3, 1)])
    for k in range(6):
        write(tmp_path / 'd' / 'Femur' / f'c{k}.dcm', frames(k), frames=2, PatientID=f'P{k}')
    write_rows(tmp_path / 'd', [['Femur', f'c{k}.dcm', '', *'abcdefgh'] for k in range(6)])
    prepare(tmp_path / 'd', 0, [], source='folder')
    write(tmp_path / 'd' / 'Femur' / 'c0.dcm', frames(9), frames=2, PatientID='P0')
    r = export(tmp_path / 'd', tmp_path / 'out', 'csv', keep_text=True)
    assert [x['file'] for x in r['left_behind']] == ['Femur/c0.dcm#0'] and r['images'] == 5


def test_every_file_that_was_read_is_watched(tmp_path):
    from openpyxl import Workbook

    b = Workbook()
    b.active.append(HEADERS)
    for x in group_folder(tmp_path, 6):
        b.active.append(x)
    b.create_sheet('more').append(['nothing'])
    b.save(tmp_path / 'answers [v2].xlsx')
    write_rows(tmp_path, [['x', 'y']], 'other.csv', ['a', 'b'])
    (tmp_path / 'Femur' / 'broken.png').write_bytes(b'no picture')
    prepare(tmp_path, 0, [], source='folder')
    assert not len(verify(tmp_path))
    for n in ('answers [v2].xlsx', 'other.csv', 'Femur/broken.png'):
        with open(tmp_path / n, 'ab') as f:
            f.write(b'x')
        assert n in set(verify(tmp_path).file), n


def test_two_builders_of_one_pixel_cache(tmp_path, monkeypatch):
    "The second begins where the first has made no file yet: neither wipes what the other says is done"
    import fada.pixels as px

    here, make, first = tmp_path / 'c', np.lib.format.open_memmap, []
    here.mkdir()
    s = px.processor_settings(8)

    def late(*args, **more):
        if not first:
            first.append(None)
            first[0] = px._cache_files(here, s, ['h1', 'h2'])
            first[0][0][0] = 7
            first[0][1][0] = True
        return make(*args, **more)

    monkeypatch.setattr(np.lib.format, 'open_memmap', late)
    pids = iter(range(9))
    monkeypatch.setattr(px.os, 'getpid', lambda: next(pids))
    px._cache_files(here, s, ['h1', 'h2'])
    px._settle(here, *first[0])
    pixels, done = px._cache_files(here, s, ['h1', 'h2'])
    assert (
        done.tolist() == [True, False]
        and (pixels[0] == 7).all()
        and sorted(p.name for p in tmp_path.iterdir()) == ['c']
    )


def test_the_data_commands_say_what_they_found(tmp_path, capsys, monkeypatch):
    "A workbook's rows, a check, an export and no change; then a change, and a set that is not published"
    import typer
    from fada.cli import data_check, data_export, data_get, data_template, data_verify

    monkeypatch.setenv('FADA_QUIET', '1')
    own = tmp_path / 'own'
    folder = str(own)
    (own / 'Femur').mkdir(parents=True)

    def said(command, *words, **more):
        command(*words, json=True, quiet=True, **more)
        return json.loads(capsys.readouterr().out)

    for k in range(5):
        picture(own / 'Femur' / f'{k}.png', k)
    r = said(data_template, folder, 'empty.xlsx')
    assert r['images'] == 5 and (own / 'empty.xlsx').is_file()
    (own / 'empty.xlsx').unlink()
    (own / 'answers.csv').write_text(
        'Folder Name,Image Name,Q6\n' + ''.join(f'Femur,{k}.png,good\n' for k in range(5))
    )
    report = tmp_path / 'found.csv'
    r = said(data_check, folder, 'auto', 'first', str(report))
    with open(report) as f:
        assert sum(1 for _ in csv.DictReader(f)) == len(r['findings'])
    prepare(own, 0, None, source='folder')
    assert said(data_verify, folder)['changes'] == []
    r = said(data_export, folder, str(tmp_path / 'share'), 'csv', None, True)
    assert (r['images'], r['answers']) == (5, 5)
    (own / 'Femur' / '3.png').unlink()
    with pytest.raises(typer.Exit) as e:
        data_verify(folder, json=True, quiet=True)
    assert e.value.exit_code == 1 and [c['file'] for c in json.loads(capsys.readouterr().out)['changes']] == [
        'Femur/3.png'
    ]
    with pytest.raises(FadaError, match='hc19.*hc18'):
        data_get('hc19', str(tmp_path / 'hc'), False, quiet=True)
    assert not (tmp_path / 'hc').exists()
