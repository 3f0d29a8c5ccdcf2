"""``antiphon doctor`` reads values of the chart as the chart renders them for Serve."""

from pathlib import Path

import pytest
import yaml
from helm_chart import EXAMPLES, Helm, serve_config

from antiphon.deployment.doctor.command import read_config


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_values_mean_what_is_deployed(helm: Helm, example: Path, tmp_path: Path) -> None:
    rendered = tmp_path / "serve.yaml"
    rendered.write_text(yaml.safe_dump(serve_config(helm.render(example))))
    assert read_config(example) == read_config(rendered)
