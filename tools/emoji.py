"""Pack the pictures of `topics.emoji_world` from three archives of the npm registry, which `npm pack` fetches:

    npm pack @lobehub/fluent-emoji-3d@1.1.0 emojibase-data@17 emoji-datasource-google@16
    python tools/emoji.py FOLDER_WITH_THE_ARCHIVES

It writes data/samples/emoji_fluent.webp and emoji_noto.webp (one picture a cell, 64 and 48 pixels, with opacity) and emoji.json (names).
"""
import io
import json
import random
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from diffusion_papers.workbench.files import whole_file
from diffusion_papers.workbench.results import write_json

GROUPS = {3: "animals and nature", 4: "food", 5: "travel", 7: "objects"}  # emojibase's numbers
COLUMNS = 24

# Whole scenes, signs, clock faces, moons, maps, second pictures of one concept, and what has no name that one would say.
DROPPED = """
monkey face; dog face; guide dog; service dog; cat face; black cat; tiger face; horse face; moose; cow face; pig face; pig nose; two-hump camel;
mouse face; rabbit face; front-facing baby chick; bird; dragon face; wing; black bird; spouting whale; bug; microbe; white flower; rosette; blossom;
herb; shamrock; fallen leaf; leaf fluttering in wind; empty nest; green apple; flatbread; cooking; shallow pan of food; clinking beer mugs;
clinking glasses; pouring liquid; teacup without handle; fork and knife; globe showing Europe-Africa; globe showing Asia-Australia;
globe with meridians; world map; map of Japan; mount fuji; camping; beach with umbrella; national park; desert; building construction; houses;
house with garden; Japanese post office; post office; bank; love hotel; convenience store; department store; wedding; synagogue; foggy;
night with stars; cityscape; sunrise over mountains; sunrise; cityscape at dusk; sunset; bridge at night; hot springs; high-speed train; train;
station; tram; mountain railway; oncoming bus; trolleybus; minibus; oncoming police car; oncoming taxi; oncoming automobile; articulated lorry;
motorway; construction; vertical traffic light; small airplane; airplane departure; airplane arrival; ferry; ship; suspension railway;
mountain cableway; hourglass not done; timer clock; twelve o’clock; twelve-thirty; one o’clock; one-thirty; two o’clock; two-thirty; three o’clock;
three-thirty; four o’clock; four-thirty; five o’clock; five-thirty; six o’clock; six-thirty; seven o’clock; seven-thirty; eight o’clock; eight-thirty;
nine o’clock; nine-thirty; ten o’clock; ten-thirty; eleven o’clock; eleven-thirty; new moon; waxing crescent moon; first quarter moon;
waxing gibbous moon; full moon; waning gibbous moon; last quarter moon; waning crescent moon; new moon face; first quarter moon face;
last quarter moon face; full moon face; sun with face; glowing star; shooting star; milky way; sun behind cloud; cloud with lightning and rain;
sun behind small cloud; sun behind large cloud; sun behind rain cloud; cloud with snow; cloud with lightning; fog; wind face; cyclone;
umbrella with rain drops; umbrella on ground; closed umbrella; snowman without snow; water wave; woman’s clothes; purse; muted speaker;
speaker low volume; speaker medium volume; bell with slash; musical score; musical notes; control knobs; mobile phone with arrow; low battery;
computer disk; dvd; camera with flash; magnifying glass tilted right; notebook with decorative cover; closed book; green book; orange book; notebook;
page with curl; page facing up; rolled-up newspaper; bookmark tabs; yen banknote; euro banknote; pound banknote; money with wings;
chart increasing with yen; e-mail; incoming envelope; envelope with arrow; outbox tray; closed mailbox with lowered flag;
open mailbox with raised flag; open mailbox with lowered flag; closed mailbox with raised flag; black nib; memo; open file folder; card index dividers;
calendar; spiral notepad; spiral calendar; chart increasing; chart decreasing; round pushpin; linked paperclips; card file box; unlocked;
locked with pen; locked with key; hammer and pick; hammer and wrench; link; placard; cigarette
"""

# What one would say, where the label is not that.
RENAMED = {
    "red apple": "apple", "leafy green": "lettuce", "stuffed flatbread": "pita", "pot of food": "stew", "bowl with spoon": "bowl", "cooked rice": "bowl of rice", "fish cake with swirl": "fish cake",
    "ice": "ice cube", "bottle with popping cork": "bottle", "tumbler glass": "glass of whisky", "ginger root": "ginger", "steaming bowl": "bowl of noodles", "salt": "salt shaker", 
    "derelict house": "haunted house", "Japanese castle": "japanese castle", "Tokyo tower": "tokyo tower", "aerial tramway": "cable car", "woman’s sandal": "sandal",
    "flat shoe": "slipper", "hair pick": "comb", "military helmet": "army helmet", "postal horn": "horn", "long drum": "conga drum", "level slider": "slider", "telephone receiver": "receiver",
    "video camera": "camcorder", "film frames": "film strip", "ballot box with ballot": "ballot box", "drop of blood": "blood drop", "motorized wheelchair": "electric wheelchair", "metro": "subway train",
    "automobile": "car", "sport utility vehicle": "jeep", "lady beetle": "ladybug", "honeybee": "bee", "horizontal traffic light": "traffic light",
    "hourglass done": "hourglass", "mantelpiece clock": "clock", "man’s shoe": "shoe", "woman’s hat": "sun hat", "woman’s boot": "boot", "billed cap": "cap",
    "rescue worker’s helmet": "helmet", "running shoe": "sneaker", "thong sandal": "flip-flop", "one-piece swimsuit": "swimsuit", "red paper lantern": "paper lantern",
    "magnifying glass tilted left": "magnifying glass", "dollar banknote": "banknote", "blue book": "book", "locked": "padlock", "ear of corn": "corn", "hot beverage": "cup of coffee",
    "glass of milk": "milk", "globe showing Americas": "globe", "cheese wedge": "cheese", "baguette bread": "baguette", "poultry leg": "chicken leg", "cut of meat": "steak", "meat on bone": "ham",
    "snow-capped mountain": "snowy mountain", "Statue of Liberty": "statue of liberty", "speaker high volume": "speaker", "mobile phone": "phone", "desktop computer": "computer",
    "optical disk": "disc", "tear-off calendar": "calendar", "straight ruler": "ruler", "spiral shell": "shell", "soft ice cream": "ice cream cone", "fork and knife with plate": "plate", "nut and bolt": "bolt",
    "roll of paper": "toilet roll", "carpentry saw": "saw", "cloud with rain": "rain cloud", "high voltage": "lightning bolt", "T-Rex": "tyrannosaur", "kiwi fruit": "kiwi", "package": "parcel",
    "police car light": "siren", "locomotive": "steam train", "tram car": "tram", "delivery truck": "truck", "graduation cap": "mortarboard", "couch and lamp": "couch",
    "adhesive bandage": "bandage", "beverage box": "juice box", "crescent moon": "moon", "sauropod": "dinosaur", 
    "blowfish": "pufferfish", "chains": "chain", "evergreen tree": "fir tree", "deciduous tree": "tree",
}

PLURAL = """grapes; cherries; blueberries; peanuts; pancakes; french fries; chopsticks; beans; briefs; ballet shoes; prayer beads; bubbles; paw prints; glasses; sunglasses; goggles; jeans; gloves; socks; shorts; maracas; books; scissors;
crossed swords; headphones""".replace("\n", " ").split("; ")
MASS = """watermelon; garlic; broccoli; bread; bacon; popcorn; butter; cheese; spaghetti; sushi; milk; bubble tea; dna; wood; soap; fire; corn; canned food; ginger; lettuce; curry rice; stew; oden; fondue; sake; coral; ham; steak; green salad""".replace("\n", " ").split("; ")

# Things whose one strong colour may plausibly be another.
RECOLOURED = """car; racing car; motor scooter; tent; umbrella; t-shirt; dress; kimono; swimsuit; shorts; socks; gloves; scarf; cap; backpack; clutch bag; handbag; slipper; high-heeled shoe; boot; sandal;
teapot; bucket; book; ledger; crayon; paintbrush; toothbrush; luggage; telephone; couch; toolbox; bell pepper; apple; rose; tulip; hibiscus; lotus; hyacinth; butterfly; fish; jellyfish; octopus; mushroom; candy; cupcake;
gem stone; droplet; star; lipstick; comb; roller skate; anchor; shield; magnet; razor; pushpin; bowl; ice cream; oil drum""".replace("\n", " ").split("; ")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink")

# The forty with which experiments begin: unlike each other, and recognisable when they are small.
FORTY = """banana; apple; pear; watermelon; carrot; strawberry; pizza; hamburger; doughnut; mushroom; panda; penguin; frog; fox; owl; lion; whale; octopus; crab; butterfly;
ladybug; rose; sunflower; cactus; fir tree; car; airplane; rocket; sailboat; house; umbrella; alarm clock; t-shirt; backpack; crown; guitar; book; teapot; bucket; star""".replace("\n", " ").split("; ")
UNMASKED = 144  # nouns that a segmentation network is never shown a mask of


def code_of(name):
    "A code point sequence in one spelling: lower case, no variation selector, no leading zeros."
    return "-".join(part.lstrip("0") for part in name.lower().split("-") if part != "fe0f")


def archive(folder, start):
    "The one archive of a folder whose name starts so."
    found = sorted(Path(folder).glob(f"{start}*.tgz"))
    if len(found) != 1: raise SystemExit(f"expected one archive {start}*.tgz in {folder}, found {len(found)}")
    return tarfile.open(found[0])


def pictures(content, under, suffix):
    "Code -> member of an archive, for the pictures below a folder of it."
    return {code_of(Path(member.name).stem): member for member in content.getmembers()
            if member.name.startswith(under) and member.name.endswith(suffix)}


def cut_out(picture, size):
    "The square around all that is not transparent, resized with premultiplied colours; uint8 (size, size, 4)."
    values = np.asarray(picture.convert("RGBA")).astype(np.float32) / 255
    rows, columns = np.nonzero(values[..., 3] > 16 / 255)
    top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    side = max(bottom - top, right - left)
    square = np.zeros((side, side, 4), np.float32)
    y, x = (side - (bottom - top)) // 2, (side - (right - left)) // 2
    square[y:y + bottom - top, x:x + right - left] = values[top:bottom, left:right]
    square[..., :3] *= square[..., 3:]
    small = np.stack([np.asarray(Image.fromarray(square[..., channel]).resize((size, size), Image.Resampling.BOX if side >= 2 * size else Image.Resampling.BILINEAR))
                      for channel in range(4)], -1)
    small[..., :3] /= np.maximum(small[..., 3:], 1e-6)
    small[small[..., 3] < 8 / 255] = 0
    return (small.clip(0, 1) * 255).round().astype(np.uint8)


def atlas(cells):
    "Pictures side by side (H, W, 4)."
    size, rows = cells[0].shape[0], -(-len(cells) // COLUMNS)
    whole = np.zeros((rows * size, COLUMNS * size, 4), np.uint8)
    for number, cell in enumerate(cells):
        row, column = divmod(number, COLUMNS)
        whole[row * size:(row + 1) * size, column * size:(column + 1) * size] = cell
    return whole


def table(entries, *drawn):
    "The things that every vendor draws, in emojibase's order."
    dropped = {name.strip() for name in DROPPED.replace("\n", " ").split(";")}
    found = [entry for entry in entries if entry.get("group") in GROUPS and all(code_of(entry["hexcode"]) in codes for codes in drawn)]
    unknown = dropped - {entry["label"] for entry in found}
    if unknown: print("dropped, and not there:", ", ".join(sorted(unknown)))
    kept = [entry for entry in found if entry["label"] not in dropped]
    names = [RENAMED.get(entry["label"], entry["label"]) for entry in kept]
    assert len(set(names)) == len(names), [name for name in names if names.count(name) > 1]
    return [{"name": name, "code": code_of(entry["hexcode"]), "group": GROUPS[entry["group"]], "tags": entry["tags"],
             "number": "plural" if name in PLURAL else "mass" if name in MASS else "singular"} for name, entry in zip(names, kept)]


def splits(nouns):
    "What is held out, by name: a colour of each thing that has several, and nouns, as many of each group as its share says."
    draw, names = random.Random(0), [noun["name"] for noun in nouns]
    assert set(RECOLOURED) | set(FORTY) <= set(names), (set(RECOLOURED) | set(FORTY)) - set(names)
    held = [[name, COLOURS[(number * 3) % len(COLOURS)]] for number, name in enumerate(sorted(RECOLOURED))]
    order = sorted(draw.sample(range(len(nouns)), len(nouns)), key=lambda number: list(GROUPS.values()).index(nouns[number]["group"]))
    unmasked = [names[order[number * len(order) // UNMASKED]] for number in range(UNMASKED)]
    return {"forty": FORTY, "recoloured": sorted(RECOLOURED), "held_out_pairs": held, "unmasked": sorted(unmasked)}


def main(folder, target):
    fluent, noto, base = (archive(folder, name) for name in ("lobehub-fluent-emoji-3d", "emoji-datasource-google", "emojibase-data"))
    entries = json.load(base.extractfile("package/en/data.json"))
    of_fluent, of_noto = pictures(fluent, "package/assets/", ".webp"), pictures(noto, "package/img/google/64/", ".png")
    nouns = table(entries, of_fluent, of_noto)
    for name, content, members, size in (("emoji_fluent", fluent, of_fluent, 64), ("emoji_noto", noto, of_noto, 48)):
        cells = [cut_out(Image.open(io.BytesIO(content.extractfile(members[noun["code"]]).read())), size) for noun in nouns]
        with whole_file(Path(target, f"{name}.webp")) as unfinished:
            Image.fromarray(atlas(cells)).save(unfinished, format="WEBP", lossless=True, quality=100, method=6)
    write_json(Path(target, "emoji.json"), {"columns": COLUMNS, "nouns": nouns} | splits(nouns))
    print(len(nouns), "things")


if __name__ == "__main__": main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else Path(__file__).parents[1] / "data/samples")
