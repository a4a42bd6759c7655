import torch
from peft import get_peft_model
from trpts_peft import TRPTSConfig, calibrate


def test_x(tiny_vit, images, labelled_images):
    for f in ("vit", "deit"):
        m = tiny_vit(f)
        x = images(4)
        print(m(x).logits)
        p = get_peft_model(m, TRPTSConfig(modules_to_save=["classifier"], keep_rate=0.5))
        s = calibrate(p, labelled_images(24))
        print(p(x).logits)
