"""Writes what is generated of the chart: schema of ``config``, table of values, golden files."""

import tempfile
from pathlib import Path

from helm_chart import (
    EXAMPLES,
    GOLDEN,
    README,
    SCHEMA,
    Helm,
    golden_text,
    readme_text,
    schema_text,
)

SCHEMA.write_text(schema_text())
README.write_text(readme_text())
with tempfile.TemporaryDirectory() as folder:
    helm = Helm(Path(folder))
    for example in EXAMPLES:
        (GOLDEN / example.name).write_text(golden_text(helm.render(example)))
