"""Converts images, videos and annotations to sentences of codes, and back. The modules are commands (EasyLM-LVM).

Sub-packages (tests/test_architecture.py lists the imports that each may have):
    media           image and video files, folders, grids, charts
    formats         the interface of tokenizers, and the files of several projects
    sources         inputs in folders, tars and tables, local or remote
    filter          which images to train on; a command too
    synthetic       rendered scenes and crops of photographs
    mappings        sentences of random mappings, which only their examples define; a command too
    vqgan           network, weight files and codec of the tokenizer
    image_quality   PSNR, SSIM, LPIPS, FID, code usage
    training        objective and discriminator that train the tokenizer
    sentence_files  reads, mixes and renders files of sentences
    builders        kinds of sentences, and the pipeline that builds them
"""
