"""The page: a front end of the engine for people, in a browser (gradio).

May import: EasyLM.storage, tokenizer.media, tokenizer.builders, tokenizer.synthetic, evaluation.prompting,
evaluation.serving. gradio is optional: this file does not import it.

The path of a visitor's request:
  guard          bounds bodies, uploads and stored files
  tabs           reads the fields of a tab
  handlers       decodes the prompt, queues it at the engine, and yields statuses, previews and the answer
  strip          arranges prompt, answer and truth as one picture to download

Modules:
  layout         the page as a whole
  tabs           the two tabs: analogy prompts and sequential prompts
  models         the models that visitors choose from, one of them in memory
  fields         the components that both tabs have
  handlers       generation with previews, settings and errors
  brush          the canvas on which visitors paint holes and masks
  video          frames of a video; video_frames: the process that reads it
  examples       example prompts, with the true answers
  files          files of the examples and of visitors
  pictures       enlarged images and their files
  strip          a prompt and its answer as one labelled picture
  guard          limits of the page's requests and of its files

Vocabulary, besides that of `evaluation.prompting` and `evaluation.serving`:
  visitor         a person who uses the page
  slot            a field for one image
  truth           the images that follow an example prompt in its scene or clip
  reconstruction  an image encoded and decoded by the tokenizer, without the model
"""
