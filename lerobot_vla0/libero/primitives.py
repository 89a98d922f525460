"""Stand-in assets for libero_object made of MuJoCo boxes and cylinders, for use without a download.

LIBERO's official task files (BDDL) and initial states work with them: each object has the name, the sites and
about the size of the original (half extents in metres below, measured on LIBERO's collision geoms), but not
its looks. Scores on these are NOT LIBERO scores.
"""

import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

# A geom: (type, half sizes, position, rgb); "can" is a cylinder along the y axis. LIBERO's task files rotate
# most objects upright, so that their local "up" is +y; that of the bbq bottle and the flat boxes is +z.
Geom = tuple[str, tuple[float, ...], tuple[float, ...], tuple[float, ...]]
TIN = (0.75, 0.75, 0.78)
WOOD, WOOD_DARK = (0.78, 0.72, 0.55), (0.72, 0.66, 0.5)


def _can(color: tuple, lid: tuple) -> list[Geom]:
    return [
        ("can", (0.031, 0.036), (0, -0.0005, -0.0035), color),
        ("can", (0.0312, 0.0025), (0, 0.035, -0.0035), lid),
    ]


def _bottle(color: tuple, cap: tuple) -> list[Geom]:
    return [
        ("box", (0.026, 0.050, 0.018), (0, -0.0225, 0), color),
        ("can", (0.014, 0.0225), (0, 0.050, 0), cap),
    ]


def _carton(color: tuple, top: tuple) -> list[Geom]:
    return [
        ("box", (0.0263, 0.0548, 0.0263), (0, -0.015, 0), color),
        ("box", (0.0263, 0.0105, 0.009), (0, 0.0505, 0), top),
    ]


def _packet(x: float, y: float, z: float, color: tuple, band: tuple) -> list[Geom]:
    # The band is 0.3 mm larger than the box, because coinciding surfaces flicker.
    return [
        ("box", (x, y, z), (0, 0, 0), color),
        ("box", (0.45 * x, y + 0.0003, z + 0.0003), (0, 0, 0), band),
    ]


OBJECTS: dict[str, list[Geom]] = {
    "alphabet_soup": _can((0.15, 0.25, 0.6), TIN),
    "tomato_sauce": _can((0.75, 0.12, 0.08), TIN),
    "salad_dressing": _bottle((0.75, 0.72, 0.5), (0.1, 0.45, 0.15)),
    "ketchup": _bottle((0.7, 0.1, 0.05), (0.95, 0.95, 0.95)),
    "bbq_sauce": [
        ("box", (0.0235, 0.0145, 0.0268), (0, 0, -0.0278), (0.35, 0.14, 0.06)),
        ("cylinder", (0.0134, 0.0268), (0, 0, 0.0257), (0.55, 0.2, 0.05)),
    ],
    "milk": _carton((0.92, 0.92, 0.95), (0.8, 0.1, 0.1)),
    "orange_juice": _carton((0.95, 0.6, 0.1), (0.2, 0.55, 0.2)),
    "cream_cheese": _packet(0.0406, 0.0213, 0.0089, (0.75, 0.82, 0.95), (0.1, 0.2, 0.6)),
    "butter": _packet(0.0381, 0.0198, 0.0087, (0.9, 0.35, 0.1), (0.95, 0.9, 0.6)),
    "chocolate_pudding": _packet(0.040, 0.0232, 0.0137, (0.3, 0.16, 0.08), (0.85, 0.75, 0.5)),
}
BASKET: list[Geom] = [
    ("box", (0.076, 0.071, 0.0085), (0, 0, 0.013), WOOD),
    ("box", (0.0067, 0.0785, 0.066), (-0.0785, 0, 0.0795), WOOD),
    ("box", (0.0067, 0.0785, 0.066), (0.0785, 0, 0.0795), WOOD),
    ("box", (0.0718, 0.0067, 0.066), (0, -0.0718, 0.0795), WOOD_DARK),
    ("box", (0.0718, 0.0067, 0.066), (0, 0.0718, 0.0795), WOOD_DARK),
]
# Distances in metres of robosuite's bottom_site, top_site and horizontal_radius_site from the origin. LIBERO
# places objects by these sites.
UPRIGHT_SITES, FLAT_SITES = (0.06, 0.04, 0.03), (0.025, 0.025, 0.03)
SITES = {
    "bbq_sauce": (0.06, 0.06, 0.015),
    "cream_cheese": FLAT_SITES,
    "butter": FLAT_SITES,
    "chocolate_pudding": FLAT_SITES,
    "basket": (0.06, 0.04, 0.025),
}
# LIBERO's own contact parameters for these objects.
CONTACT = 'solimp="0.998 0.998 0.001" solref="0.001 1" density="100" friction="0.95 0.3 0.1"'
# The region that the goal predicate In(object, basket) tests.
CONTAIN_REGION = (
    '<site type="box" name="contain_region" pos="0 0 .07185" quat="0 0 0 1" size=".06108 .06108 .06949" '
    'group="0" rgba="0 0 0 0"/>'
)
WALL = 'type="box" contype="0" conaffinity="0" group="1" material="walls_mat"'
SCENE = f"""<mujoco model="floor_arena"><asset>
  <texture builtin="gradient" height="64" width="64" rgb1=".9 .9 1" rgb2=".2 .3 .4" type="skybox"/>
  <texture file="../textures/light-gray-floor-tile.png" type="2d" name="texplane"/>
  <material name="floorplane" texrepeat="3 3" texture="texplane" texuniform="true" specular="0"
    shininess="0"/>
  <texture file="../textures/light-gray-plaster.png" type="2d" name="tex-wall"/>
  <material name="walls_mat" texrepeat="3 3" texture="tex-wall" texuniform="true" specular=".8"
    shininess=".1"/>
</asset><worldbody>
  <body name="floor" pos="0 0 0">
    <geom name="floor" type="plane" size="3 3 .125" condim="3" group="1" material="floorplane"/>
  </body>
  <geom pos="-2 0 1.5" quat=".5 .5 .5 .5" size="1.5 1.5 .01" {WALL}/>
  <geom pos="1.25 3 1.5" quat=".7071 .7071 0 0" size="1.75 1.5 .01" {WALL}/>
  <geom pos="1.25 -3 1.5" quat=".7071 -.7071 0 0" size="1.75 1.5 .01" {WALL}/>
  <light name="light1" diffuse=".8 .8 .8" specular=".3 .3 .3" dir="0 -.15 -1" pos="1 1 4" castshadow="false"/>
  <light name="light2" diffuse=".8 .8 .8" specular=".3 .3 .3" dir="0 -.15 -1" pos="-3 -3 4"
    castshadow="false"/>
  <camera mode="fixed" name="frontview" pos="1 0 1.45" quat=".56 .43 .43 .56"/>
  <camera mode="fixed" name="birdview" pos="-.2 0 3" quat=".7071 0 0 .7071"/>
  <camera mode="fixed" name="agentview" pos=".5 0 1.35" quat=".653 .271 .271 .653"/>
  <camera mode="fixed" name="sideview" pos="-.0565 1.276 1.488" quat=".0099 .0069 .5912 .8064"/>
</worldbody></mujoco>
"""


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{v:.5g}" for v in values)


def _geom_xml(geom: Geom) -> str:
    """A geom for contacts (invisible, group 0) and one for the cameras (no contact, no mass, group 1)."""
    kind, size, position, color = geom
    quat = "0.7071068 0.7071068 0 0" if kind == "can" else "1 0 0 0"
    kind = "cylinder" if kind == "can" else kind
    shape = f'type="{kind}" size="{_numbers(size)}" pos="{_numbers(position)}" quat="{quat}"'
    return (
        f'<geom {CONTACT} {shape} group="0" rgba=".8 .8 .8 0"/>'
        f'<geom {shape} group="1" contype="0" conaffinity="0" mass="0" rgba="{_numbers(color)} 1"/>'
    )


def _object_xml(name: str, geoms: list[Geom], inside: str = "") -> str:
    bottom, top, radius = SITES.get(name, UPRIGHT_SITES)
    body = "\n    ".join(map(_geom_xml, geoms))
    look = 'size=".005" rgba="0 0 0 0"'
    return f"""<mujoco model="{name}"><worldbody><body>
  <body name="object">{inside}
    {body}
  </body>
  <site name="bottom_site" pos="0 0 -{bottom}" {look}/>
  <site name="top_site" pos="0 0 {top}" {look}/>
  <site name="horizontal_radius_site" pos="{radius} {radius} 0" {look}/>
</body></worldbody></mujoco>
"""


def write_primitive_assets(folder: Path) -> Path:
    """Writes the asset folder (about 60 KB) unless it exists. Several processes may call this at once."""
    folder = Path(folder)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written to a temporary folder and renamed, so that no other process sees an incomplete one.
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    texts = {f"stable_hope_objects/{name}/{name}.xml": _object_xml(name, g) for name, g in OBJECTS.items()}
    texts["stable_scanned_objects/basket/basket.xml"] = _object_xml("basket", BASKET, CONTAIN_REGION)
    texts["scenes/libero_floor_base_style.xml"] = SCENE
    for name, text in texts.items():
        (draft / name).parent.mkdir(parents=True, exist_ok=True)
        (draft / name).write_text(text)
    for empty in ("articulated_objects", "turbosquid_objects", "textures"):  # hf-libero looks for them
        (draft / empty).mkdir()
    y, x = np.mgrid[:64, :64]
    tiles = np.where((x % 32 == 0) | (y % 32 == 0), 96, 150 + (7 * x + 13 * y) % 9)
    plaster = 168 + (11 * x + 5 * y) % 7
    for name, gray in (("light-gray-floor-tile", tiles), ("light-gray-plaster", plaster)):
        picture = np.repeat(gray[..., None], 3, axis=-1).astype(np.uint8)
        Image.fromarray(picture).save(draft / "textures" / f"{name}.png")
    draft.chmod(0o755)
    try:
        draft.rename(folder)
    except OSError:  # another process has written the same folder in the meantime
        shutil.rmtree(draft)
    return folder
