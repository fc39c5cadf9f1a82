"""Where each part of the data root comes from: the archive or page that its makers publish."""

from pathlib import PurePosixPath

_COCO_IMAGES = "refer_seg/images/mscoco/images"

ARCHIVES = {
    "ade20k": "ADEChallengeData2016.zip of the MIT Scene Parsing Benchmark",
    "coco/train2017": "train2017.zip of COCO",
    "coco/val2017": "val2017.zip of COCO",
    "cocostuff": "stuffthingmaps_trainval2017.zip of COCO-Stuff",
    "gqa": "images.zip of GQA",
    "llava_dataset/llava_instruct_150k.json": "llava_instruct_150k.json of liuhaotian/LLaVA-Instruct-150K",
    "llava_dataset/llava_v1_5_mix665k.json": "llava_v1_5_mix665k.json of liuhaotian/LLaVA-Instruct-150K",
    "mapillary": "the archive of Mapillary Vistas 2.0",
    "muse": "the MUSE files that PixelLM's page links",
    "ocr_vqa": "the images of OCR-VQA",
    "reason_seg": "the ReasonSeg archive that LISA's page links",
    "refer_seg/grefcoco": "the gRefCOCO files of henghuiding/gRefCOCO",
    "refer_seg/refclef": "refclef.zip of lichengunc/refer",
    "refer_seg/refcoco": "refcoco.zip of lichengunc/refer",
    "refer_seg/refcoco+": "refcoco+.zip of lichengunc/refer",
    "refer_seg/refcocog": "refcocog.zip of lichengunc/refer",
    "refer_seg/images/saiapr_tc-12": "saiapr_tc-12.zip of lichengunc/refer",
    f"{_COCO_IMAGES}/train2014": "train2014.zip of COCO",
    f"{_COCO_IMAGES}/train2017": "train2017.zip of COCO",
    f"{_COCO_IMAGES}/val2017": "val2017.zip of COCO",
    "textvqa": "train_val_images.zip of TextVQA",
    "vg/VG_100K": "images.zip of Visual Genome",
    "vg/VG_100K_2": "images2.zip of Visual Genome",
    "vlpart/paco": "paco_lvis_v1.zip of PACO",
    "vlpart/partimagenet": "the PartImageNet archive of TACJu/PartImageNet",
    "vlpart/pascal_part": "the train.json of Pascal-Part in COCO's form that LISA's page links",
    "vlpart/pascal_part/VOCdevkit": "VOCtrainval_03-May-2010.tar of PASCAL VOC 2010",
}


def archive_of(path: str) -> str | None:
    """What holds `path` (below the data root, parted by "/"), or None where nobody is known to publish it."""
    parts = PurePosixPath(path).parts
    known = ("/".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((ARCHIVES[part] for part in known if part in ARCHIVES), None)
