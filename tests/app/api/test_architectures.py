"""Uploads of a state dict name the program that uses the weights, out of a list that the service shows."""

import pytest
from starlette.testclient import TestClient

from app.recipes.architectures import ARCHITECTURES, parse_architecture
from tests.app.jobs.world import World


@pytest.mark.parametrize("architecture", ["resnet20", "vit:heads=6,image_size=32"])
def test_an_architecture_goes_from_the_upload_to_the_worker(both: tuple[TestClient, World], architecture: str) -> None:
    client, world = both
    params = {"format": "safetensors", "architecture": architecture}
    answer = client.post("/v1/models", params=params, content=b"abc")
    assert answer.status_code == 201
    model = answer.json()
    assert (model["format"], model["architecture"]) == ("safetensors", architecture)
    assert client.get(model["links"]["self"]).json() == model
    (check_id,) = world.outbox()
    held = world.start(check_id)
    assert held.model is not None
    assert (held.model.format, held.model.architecture) == ("safetensors", architecture)


@pytest.mark.parametrize("format", ["pt2", "hf", "onnx"])
def test_a_file_with_a_program_needs_no_architecture(client: TestClient, format: str) -> None:
    answer = client.post("/v1/models", params={"format": format}, content=b"abc")
    assert (answer.status_code, answer.json()["architecture"]) == (201, None)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"format": "safetensors"}, "needs an architecture"),
        ({"format": "pt2", "architecture": "resnet20"}, "brings its own program"),
        ({"format": "hf", "architecture": "bert"}, "brings its own program"),
        ({"architecture": "resnet20"}, "brings its own program"),
        ({"format": "safetensors", "architecture": "mobilnet_v2"}, "did you mean 'mobilenet_v2'?"),
        ({"format": "safetensors", "architecture": "vit:head=3"}, "did you mean 'heads'?"),
        ({"format": "safetensors", "architecture": "vit:heads=0"}, "from 1 to 1024"),
        ({"format": "safetensors", "architecture": "vit:heads=3,heads=3"}, "given twice"),
        ({"format": "safetensors", "architecture": "vit:heads=3.5"}, "not an integer"),
        ({"format": "safetensors", "architecture": "../vit"}, "is not an architecture"),
    ],
)
def test_other_combinations_are_refused_before_the_upload(
    client: TestClient, params: dict[str, str], words: str
) -> None:
    answer = client.post("/v1/models", params=params, content=b"abc")
    assert answer.status_code == 422
    (problem,) = answer.json()["errors"]
    assert problem["pointer"] == "query:architecture"
    assert words in problem["detail"]
    assert "GET /v1/architectures" in problem["detail"]
    assert client.get("/v1/models").json()["items"] == []


@pytest.mark.parametrize("format", ["gguf", "torchscript"])
def test_formats_that_are_not_offered_are_refused(client: TestClient, format: str) -> None:
    answer = client.post("/v1/models", params={"format": format}, content=b"abc")
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "query:format")


def test_the_list_says_everything_an_upload_may(client: TestClient) -> None:
    items = client.get("/v1/architectures").json()["items"]
    assert [item["name"] for item in items] == list(ARCHITECTURES)
    for item in items:
        assert item["summary"]
        assert item["weights"]
        for parameter in item["parameters"]:
            assert parameter["description"]
            for bound in (parameter["minimum"], parameter["maximum"]):
                value = bound if parameter["type"] == "number" else int(bound)
                assert value == bound
                parse_architecture(f"{item['name']}:{parameter['name']}={value}")
    heads = next(
        each for item in items if item["name"] == "vit" for each in item["parameters"] if each["name"] == "heads"
    )
    assert (heads["type"], heads["default"], heads["minimum"]) == ("integer", None, 1)
