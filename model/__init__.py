"""Networks. torch only: no loss, no batch dict, no process group, and nothing else of ours but `vitscale.errors`.

Shape suffixes (a tensor whose shape is not plain from its line carries one, as in `tokens_BND`):
B batch · L blocks · N tokens · D width · H heads · E width of a head (D / H) · C channels · K classes · P patch side ·
W windows · Y, X rows and columns (pixels of an image, patches of a grid).
"""
