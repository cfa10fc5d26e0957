"""The page of an endpoint as a file; tests/e2e/test_page.py opens it in a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path

from lepton_ray.serving.keys import Keyring
from lepton_ray.serving.runtime import Runtime
from tests import apps


def test_the_policy_lets_no_script_in_and_no_byte_out(digits: Runtime) -> None:
    app = apps.app(digits)
    first, second = app.get("/"), app.get("/")
    policy = first.headers["content-security-policy"]
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'; script-src 'nonce-")
    assert policy != second.headers["content-security-policy"], "a nonce is used once"
    assert not re.search(r"(src|href|url)[=(]\W*(https?:)?//", first.text)
    assert len(first.content) < 60_000


def test_what_a_person_s_data_say_cannot_leave_its_place(tmp_path: Path) -> None:
    named = Runtime.load(apps.write_people(tmp_path), name="</title><b>$model", version=1)
    text = apps.app(named).get("/").text
    assert "<b>" not in text
    assert text.count("</script>") == 2
    model = json.loads(re.findall(r'id="model">(.*?)</script>', text)[0])
    assert model["columns"][1]["categories"] == ["</script><b>", "Bonn", "Rom"]


def test_with_keys_nothing_of_the_model_is_told_without_one(people: Runtime) -> None:
    app = apps.app(people, Keyring(()))
    assert (app.get("/").status_code, "Bonn" in app.get("/").text) == (200, False)
    assert app.get("/page.json").status_code == 401
    assert apps.app(people).get("/page.json").json()["columns"][1]["categories"][0] == "Bonn"
