"Published layouts: labels answer what they answer, nothing else; published splits hold or are refused."

import pandas as pd
import pytest
from fada.data import split_table
from fada.readers import guess_reader, read_any
from fada.settings import FadaError
from test_data import picture


def test_african_planes(tmp_path):
    rows = []
    for k, (centre, code) in enumerate((('Algeria', 'DZA'), ('Ghana', 'GHA'))):
        for j, plane in enumerate(('Fetal femur', 'Fetal brain', 'Fetal abdomen')):
            n = f'patient001_{code}_plane{j}'
            picture(tmp_path / centre / f'{n}.png', 10 * k + j)
            rows.append((n, plane, centre, 1, k))
    pd.DataFrame(rows, columns=['Filename', 'Plane', 'Center', 'Patient_num', 'Train']).to_csv(
        tmp_path / 'African_planes_database.csv', index=False
    )
    assert guess_reader(tmp_path) == 'african-planes'
    r = read_any(tmp_path)
    t = r.table
    # numbers start anew in each centre
    assert set(t.question_id) == {3} and len(t) == 4 and t.patient.nunique() == 2
    assert (r.quarantine.reason == 'the brain plane is not labelled').sum() == 2 and set(t.site) == {
        'Algeria',
        'Ghana',
    }


def test_fetal_nt(tmp_path):
    for n, f in (('1', 'Standard'), ('2', 'Non-standard'), ('3', 'Non-standard')):
        picture(tmp_path / 'Set1' / f / f'{n}.png', int(n))
    pd.DataFrame(
        dict(
            fname=['1.png', '1.png', '2.png', '9.png', '2.png'],
            structure=['NT', 'nasal bone', 'palate', 'NT', 'tail'],
            h_min=0,
            w_min=0,
            h_max=5,
            w_max=5,
        )
    ).to_excel(tmp_path / 'ObjectDetection.xlsx', index=False)
    assert guess_reader(tmp_path) == 'fetal-nt'
    r = read_any(tmp_path)
    said = {(x['image'][-5], x['question_id']): x['answer'] for x in r.rows}
    assert said['1', 1] == 'nuchal translucency, nasal bone' and said['2', 1] == 'palate' and ('3', 1) not in said
    assert (
        said['1', 3].endswith(', standard')
        and said['3', 3].endswith('non-standard')
        and {q for _, q in said} == {1, 3}
    )
    assert len(r.aside) == 2  # the box without a picture, the structure that is none of the nine


def test_a_published_split_that_leaks_names_the_patients(tmp_path):
    rows = []
    for k in range(8):
        picture(tmp_path / 'Images' / f'P{k}.png', k)
        rows.append((f'P{k}', k // 2, 'Fetal femur', 'Not A Brain', 'Op', 'US', int(k not in (3, 6, 7))))
    pd.DataFrame(
        rows, columns=['Image_name', 'Patient_num', 'Plane', 'Brain_plane', 'Operator', 'US_Machine', 'Train ']
    ).to_csv(tmp_path / 'FETAL_PLANES_DB_data.csv', sep=';', index=False)
    t = read_any(tmp_path).table
    with pytest.raises(FadaError, match='divides 1 patients.*fetal-planes:1'):
        split_table(t)
    t.loc[t.patient == 'fetal-planes:1', 'published_split'] = 'train'
    s = split_table(t)
    assert set(s[s.split == 'test'].patient) == {'fetal-planes:3'} and s.groupby('patient').split.nunique().max() == 1


def test_hc18_sets_that_share_file_names(tmp_path):
    "Both sets count from 1: each row gets the picture of its own set, and a name that fits two is set aside"
    for k, s in enumerate(('training_set', 'test_set')):
        picture(tmp_path / s / '001_HC.png', k)
    for k, d in enumerate(('a', 'b')):
        picture(tmp_path / 'training_set' / d / '002_HC.png', 5 + k)
    # a folder that names neither set
    picture(tmp_path / 'latest' / '004_HC.png', 9)
    pd.DataFrame(
        {
            'filename': ['001_HC.png', '002_HC.png', '004_HC.png'],
            'pixel size(mm)': 0.1,
            'head circumference (mm)': [44.3, 50, 60],
        }
    ).to_csv(tmp_path / 'training_set_pixel_size_and_HC.csv', index=False)
    pd.DataFrame({'filename': ['001_HC.png', '003_HC.png'], 'pixel size(mm)': 0.2}).to_csv(
        tmp_path / 'test_set_pixel_size.csv', index=False
    )
    r = read_any(tmp_path)
    assert [(x['image'], x['mm_per_px']) for x in r.rows] == [
        ('training_set/001_HC.png', 0.1),
        ('latest/004_HC.png', 0.1),
    ]
    said = ' | '.join(r.quarantine.reason)
    assert '2 images of one name' in said and "no image '003_HC.png'" in said


def test_two_pictures_of_one_stem_get_no_label_of_each_other(tmp_path):
    for k, centre in enumerate('ab'):
        picture(tmp_path / centre / 'P1.png', k)
    pd.DataFrame(
        [('P1', 1, 'Fetal femur', 'x', 'y', 1)],
        columns=['Image_name', 'Patient_num', 'Plane', 'Brain_plane', 'Operator', 'Train '],
    ).to_csv(tmp_path / 'FETAL_PLANES_DB_data.csv', sep=';', index=False)
    r = read_any(tmp_path)
    assert not r.rows and r.quarantine.reason.str.startswith('2 images of one name').sum() == 1


@pytest.mark.parametrize(
    'folder,category',
    [
        ('anonymised/Standard', 'Standard_NT'),
        ('Non-standard/x', 'Non_standard_NT'),
        ('non_standard', 'Non_standard_NT'),
        ('Nonstandard', 'Non_standard_NT'),
        ('Non-standard planes/Standard', 'Standard_NT'),
        ('canon standard', 'Standard_NT'),
    ],
)
def test_the_nearest_folder_says_whether_a_plane_is_standard(tmp_path, folder, category):
    picture(tmp_path / folder / 'x.png')
    picture(tmp_path / 'y.png', 1)
    pd.DataFrame(dict(fname=['y.png'], structure=['NT'])).to_excel(tmp_path / 'ObjectDetection.xlsx', index=False)
    assert {x['category'] for x in read_any(tmp_path).rows if x['image'].endswith('x.png')} == {category}
