"""The 150 classes of ADEChallengeData2016 in the order of their labels: label n (1…150) is ADE20K_CLASSES[n - 1].

Of each class's synonyms the plainest word was taken, and no word twice.
"""

ADE20K_CLASSES = tuple(
    name.strip()
    for name in """
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
""".replace("\n", " ").split(",")
)
