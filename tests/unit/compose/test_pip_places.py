"""Where pip finds packages, carried into an image."""

from compose.docker_host import CA_BUNDLE, has_cpu_torch, pip_places


def test_nothing_configured_is_only_the_certificates():
    places = pip_places("global.timeout='60'\n")
    assert places.lines == ("[global]", f"cert = {CA_BUNDLE}")
    assert places.folders == ()


def test_remote_places_stay_and_folders_of_wheels_move_inside(tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    listing = f"""\
:env:.find-links='{wheels}'
global.extra-index-url='https://mirror.example/simple file:///opt/index'
global.index-url='https://pypi.example/simple'
"""
    places = pip_places(listing)
    assert places.lines[2:] == (
        "extra-index-url = https://mirror.example/simple",
        "find-links = /opt/pip/0",
        "index-url = https://pypi.example/simple",
    )
    assert places.folders == ((wheels, "/opt/pip/0"),)


def test_a_folder_that_is_not_there_is_left_out(tmp_path):
    assert pip_places(f"global.find-links='{tmp_path / 'none'}'").folders == ()


def test_torch_is_found_by_its_very_version(tmp_path):
    (tmp_path / "torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl").touch()
    places = pip_places(f"global.find-links='{tmp_path}'")
    assert has_cpu_torch(places, "2.13.0")
    assert not has_cpu_torch(places, "2.14.0")
