"""The class lists of label maps whose files do not carry them."""


def _listed(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.replace("\n", " ").split(","))


ADE20K_CLASSES = _listed("""
wall, building, sky, floor, tree, ceiling, road, bed, window, grass, cabinet, sidewalk, person, ground, door, table,
mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, armchair, seat,
fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, pedestal, box, column, signboard, chest of drawers,
counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, display case, pool table,
pillow, screen door, staircase, river, bridge, bookcase, window blind, coffee table, toilet, flower, book, hill,
bench, countertop, stove, palm tree, kitchen island, computer, swivel chair, boat, bar, arcade machine, hut, bus,
towel, light, truck, tower, chandelier, awning, streetlight, booth, television, airplane, dirt track, clothes, pole,
land, handrail, escalator, ottoman, bottle, sideboard, poster, stage, van, ship, fountain, conveyor belt, canopy,
washing machine, toy, swimming pool, stool, barrel, basket, waterfall, tent, bag, motorbike, cradle, oven, ball, food,
step, storage tank, trade name, microwave, flowerpot, animal, bicycle, lake, dishwasher, projection screen, blanket,
sculpture, exhaust hood, sconce, vase, traffic light, tray, trash can, fan, pier, crt screen, plate, monitor, bulletin
board, shower, radiator, drinking glass, clock, flag
""")
"""The 150 classes of ADEChallengeData2016 in the order of their labels: label n (1…150) is ADE20K_CLASSES[n - 1].

Of each class's synonyms the plainest word was taken, and no word twice.
"""

COCO_STUFF_CLASSES = _listed("""
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, street sign,
stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, hat, backpack,
umbrella, shoe, eyeglasses, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat,
baseball glove, skateboard, surfboard, tennis racket, bottle, plate, wine glass, cup, fork, knife, spoon, bowl, banana,
apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, mirror,
dining table, window, desk, toilet, door, television, laptop, computer mouse, remote control, keyboard, cell phone,
microwave, oven, toaster, sink, refrigerator, blender, book, clock, vase, scissors, teddy bear, hair drier, toothbrush,
hair brush, banner, blanket, branch, bridge, building-other, bush, cabinet, cage, cardboard, carpet, ceiling-other,
ceiling-tile, cloth, clothes, clouds, counter, cupboard, curtain, desk-stuff, dirt, door-stuff, fence, floor-marble,
floor-other, floor-stone, floor-tile, floor-wood, flower, fog, food-other, fruit, furniture-other, grass, gravel,
ground-other, hill, house, leaves, light, mat, metal, mirror-stuff, moss, mountain, mud, napkin, net, paper, pavement,
pillow, plant-other, plastic, platform, playing field, railing, railroad, river, road, rock, roof, rug, salad, sand,
sea, shelf, sky, skyscraper, snow, solid-other, stairs, stone, straw, structural-other, table, tent, textile-other,
towel, tree, vegetable, wall-brick, wall-concrete, wall-other, wall-panel, wall-stone, wall-tile, wall-wood,
water-other, water drops, window-blind, window-other, wood
""")
"""The 182 classes of COCO-Stuff in the order of their labels: label n (0…181) is COCO_STUFF_CLASSES[n].

Eleven of them (street sign, hat, shoe, eyeglasses, plate, mirror, window, desk, door, blender, hair brush) occur in no
annotation, but keep their numbers.
"""
