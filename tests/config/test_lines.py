"""Finding keys in TOML text."""

from flame.config.lines import find_key_lines

TEXT = '''# first
top = 1
[a]
x = "has # and [ and \\" quote"   # comment
y = [ # open
  1,
  2, # ]
]
z = """
[not_a_table]
x = 5
"""
w = \'\'\'
\'\'\'
"quoted key" = {p = 1, q = [2]}
dotted.key = 2
[a.b]
x = 1
[[a.list]]
x = 1
[[a.list]]
x = 2
[a.list.inner]
x = 3
[ spaced . "na.me" ]
x = 1
'''


def test_lines_of_keys_tables_and_array_tables():
    lines = find_key_lines("f.toml", TEXT).lines
    expected = {
        ("top",): 2,
        ("a",): 3,
        ("a", "x"): 4,
        ("a", "y"): 5,
        ("a", "z"): 9,
        ("a", "w"): 13,
        ("a", "quoted key"): 15,
        ("a", "dotted", "key"): 16,
        ("a", "b", "x"): 18,
        ("a", "list", 0, "x"): 20,
        ("a", "list", 1): 21,
        ("a", "list", 1, "x"): 22,
        ("a", "list", 1, "inner", "x"): 24,
        ("spaced", "na.me", "x"): 26,
    }
    assert {path: lines.get(path) for path in expected} == expected
    assert ("not_a_table",) not in lines


def test_unlisted_key_falls_back_to_what_surrounds_it():
    found = find_key_lines("f.toml", TEXT)
    assert found.where(("a", "quoted key", "p")) == "f.toml:15"
    assert found.where(("a", "missing")) == "f.toml:3"
    assert found.where(("missing",)) == "f.toml"
