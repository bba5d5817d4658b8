"""Image files, video files, folders and charts. May import EasyLM.storage; never JAX.

Import the modules as namespaces: `from tokenizer.media import images`.

  images         one image file: decode to RGB pixels, encode as PNG, write atomically
  sample_values  what the stored values of an image file mean (used by images)
  colours        other primaries and transfer functions to sRGB (used by sample_values, video_frames)
  folders        list a folder's files, match them by stem, sort names in natural order
  grids          several images as one
  videos         frame times and scenes of a video file, and the frames at given times
  video_file     VideoFile: a local file or a member of a container that FFmpeg can open
  video_clock    frame times and seek points, from packets or by decoding (used by videos)
  video_decoder  decodes selected frames, and keeps the file open for the next ones (used by videos)
  video_frames   decoded frames to upright sRGB pixels (used by videos)
  video_cuts     hard cuts, from the colours of the frames (used by videos)
  video_writer   frames to an MP4 or GIF file
  charts         matplotlib figures: creation, common style, atomic save

Vocabulary:
  pixels        RGB, channels last: uint8, or float32 in [0, 1]
  stem          a file's path within its folder, without the extension: `cats/0001`
  natural order numbers in names compare as numbers: 2.png before 10.png
  seek point    a frame of a video from which decoding can begin
  tick          the unit of a video stream's time stamps
Shapes: n images or frames, k selected frames, S the side in pixels.
"""
