"""Images, videos and annotations to visual sentences of VQGAN codes, and back. The modules are commands.

Rooms; all may import EasyLM's lower rooms, and tests/test_architecture.py holds the exact table:
    media           image and video files, folders, grids, charts
    synthetic       rendered scenes and crops of photographs
    vqgan           the tokenizer's network, files and codec
    image_quality   PSNR, SSIM, LPIPS, FID, code usage
    training        losses and discriminator of the tokenizer's training
    sentence_files  reading, mixing and rendering files of sentences
    builders        kinds of sentences, and the pipeline that builds them
"""
